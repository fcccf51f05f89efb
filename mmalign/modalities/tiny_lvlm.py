"""The smallest real vision-language models, one per family, from configuration alone: for tests and dry runs.

Each is a genuine transformers model of the family's own classes (some 60,000 random weights, two layers, width 32) with
its real processor, a byte-level tokenizer that holds the family's special tokens, and a chat template of the family's
structure. The folder is what AutoModelForImageTextToText and AutoProcessor load. The weights are drawn wider than for
training, so that log-probs differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.modalities.diffusion_loading import no_progress_bars
from mmalign.modalities.tiny_lvlm_chat import (
    GEMMA_TEMPLATE,
    IDEFICS_TEMPLATE,
    LLAVA_TEMPLATE,
    MISTRAL_TEMPLATE,
    ONEVISION_TEMPLATE,
    QWEN_SYSTEM,
    byte_tokenizer,
    chatml,
    qwen_template,
    qwen_tokenizer,
)

WIDTH, SPREAD = 32, 0.2
TILES = [[16, 32], [32, 16], [32, 32]]  # height and width of the pictures that LLaVA-NeXT and OneVision cut up


def llava(folder: Path, seed: int = 0) -> Path:
    """LLaVA-1.5: a CLIP tower of 2 x 2 patches, 4 tokens per picture; `USER: <image>\\n... ASSISTANT: ...</s>`."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = byte_tokenizer({"bos": "<s>", "eos": "</s>", "pad": "<pad>", "image": "<image>"}, start="<s>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_tower(), projection_dim=16),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=4,
    )
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    return _save(folder, LlavaForConditionalGeneration, config, processor, seed)


def llava_next(folder: Path, seed: int = 0) -> Path:
    """LLaVA-NeXT: the picture whole and in tiles of 16 px, a newline token per row; `[INST] <image>\\n... [/INST]`."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    tokenizer = byte_tokenizer({"bos": "<s>", "eos": "</s>", "pad": "<pad>", "image": "<image>"}, start="<s>")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(), projection_dim=16),
        text_config=MistralConfig(**_text(tokenizer), head_dim=16, sliding_window=None),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=TILES,
        image_seq_length=4,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=TILES
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=MISTRAL_TEMPLATE,
        num_additional_image_tokens=1,
    )
    return _save(folder, LlavaNextForConditionalGeneration, config, processor, seed)


def llava_onevision(folder: Path, seed: int = 0) -> Path:
    """LLaVA-OneVision: SigLIP and Qwen2; tiles for a single picture, the whole alone for each of several."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    named = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "image": "<image>", "video": "<video>"}
    tokenizer = byte_tokenizer(named, more=["<|im_start|>"])
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(), vision_use_head=False),
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=TILES,
    )
    size = {"height": 16, "width": 16}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=TILES),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    return _save(folder, LlavaOnevisionForConditionalGeneration, config, processor, seed)


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL: M-RoPE, a token for every 8 x 8 pixels (1 to 9 per picture); ChatML with its system turn."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = qwen_tokenizer()
    vision = {
        **{"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH},
        **{"patch_size": 4, "initializer_range": SPREAD},
    }
    config = Qwen2VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": _mrope()},
        vision_config=vision,
        **_qwen_tokens(tokenizer),
    )
    processor = Qwen2VLProcessor(*_qwen_processors(tokenizer), chat_template=qwen_template(QWEN_SYSTEM))
    return _save(folder, Qwen2VLForConditionalGeneration, config, processor, seed)


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2.5-VL: M-RoPE, windowed vision attention, a token for every 8 x 8 pixels (1 to 9 per picture); ChatML."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = qwen_tokenizer()
    vision = {
        **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH},
        **{"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": SPREAD},
    }
    config = Qwen2_5_VLConfig(
        text_config={**_text(tokenizer), "rope_parameters": _mrope()},
        vision_config=vision,
        **_qwen_tokens(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(*_qwen_processors(tokenizer), chat_template=qwen_template(QWEN_SYSTEM))
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor, seed)


def qwen3_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen3-VL: interleaved M-RoPE, and features of both vision layers added deep in the language model."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = qwen_tokenizer()
    vision = {
        **{"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH},
        **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        "initializer_range": SPREAD,
    }
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config={**_text(tokenizer), "head_dim": 16, "rope_parameters": rope},
        vision_config=vision,
        **_qwen_tokens(tokenizer),
    )
    images, _, _ = _qwen_processors(tokenizer)
    videos = Qwen3VLVideoProcessor(size=images.size, patch_size=4, merge_size=2)
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=qwen_template(""))
    return _save(folder, Qwen3VLForConditionalGeneration, config, processor, seed)


def internvl(folder: Path, seed: int = 0) -> Path:
    """InternVL3: tiles of 16 px and a thumbnail, 4 tokens each, between `<img>` and `</img>`; tied embeddings."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )

    named = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    named |= {"start_image": "<img>", "end_image": "</img>"}
    tokenizer = byte_tokenizer(named, more=["<|im_start|>"])
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**_tower(), "patch_size": 4}),
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    size = {"height": 16, "width": 16}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=3),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )
    return _save(folder, InternVLForConditionalGeneration, config, processor, seed)


def idefics3(folder: Path, seed: int = 0) -> Path:
    """Idefics3 (and SmolVLM): tiles of 16 px in rows and columns that are named, and the whole; 4 tokens each."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        Idefics3VisionConfig,
        LlamaConfig,
    )

    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    named = {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>", "image": "<image>"}
    tokenizer = byte_tokenizer(named, more=["<fake_token_around_image>", "<global-img>", *places])
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**{**_tower(), "patch_size": 4}),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, processor, seed)


def gemma3(folder: Path, seed: int = 0) -> Path:
    """Gemma 3: pictures attend to themselves both ways, every other layer sees 32 tokens back; tied embeddings."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    named = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "image": "<image_soft_token>"}
    named |= {"boi": "<start_of_image>", "eoi": "<end_of_image>"}
    tokenizer = byte_tokenizer(named, more=["<start_of_turn>", "<end_of_turn>"], start="<bos>")
    text = Gemma3TextConfig(
        **_text(tokenizer),
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**{**_tower(), "patch_size": 4}, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        initializer_range=SPREAD,
    )
    images = Gemma3ImageProcessor(size={"height": 16, "width": 16})
    processor = Gemma3Processor(images, tokenizer, chat_template=GEMMA_TEMPLATE, image_seq_length=4)
    return _save(folder, Gemma3ForConditionalGeneration, config, processor, seed, ends=["<eos>", "<end_of_turn>"])


def _qwen_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names}


def _qwen_processors(tokenizer: Any) -> tuple[Any, Any, Any]:
    """Image processor, tokenizer and video processor, in the order in which the Qwens' processors take them."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 64, "longest_edge": 9 * 64}
    images = Qwen2VLImageProcessor(size=size, patch_size=4, merge_size=2)
    return images, tokenizer, Qwen2VLVideoProcessor(size=size, patch_size=4, merge_size=2)


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _tower() -> dict[str, Any]:
    """A vision transformer on 16 px pictures of 2 x 2 patches."""
    return {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 16, "patch_size": 8, "initializer_range": SPREAD},
    }


def _text(tokenizer: Any) -> dict[str, Any]:
    """The language model: two layers, two heads that share their keys and values."""
    return {
        **{"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 512},
        **{"initializer_range": SPREAD, "bos_token_id": tokenizer.bos_token_id},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    }


def _save(
    folder: Path, model_class: Any, config: Any, processor: Any, seed: int, ends: Sequence[str] | None = None
) -> Path:
    """`ends` are the tokens at which generation stops, where eos alone is not enough."""
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # Gemma's projector starts at zero: it would see nothing
                torch.nn.init.normal_(parameter, std=SPREAD)
    eos = tokenizer.eos_token_id if ends is None else tokenizer.convert_tokens_to_ids(list(ends))
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with no_progress_bars():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "gemma3": gemma3,
}
