"""The frozen parts of `digits-flux` and `digits-sd3`: tokenizers, text encoders, schedulers, and the autoencoder's training.

Text encoders have seeded random weights: what matters is that different words give different embeddings. Every word of the
prompts is one token; any other text is read letter by letter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.captioned_digits import DIGIT_PROMPTS
from tinyfusion.data.digits import load_digits

TOKENS = 6  # of a prompt, with start and end; max_sequence_length of the pipelines
TEXT_WIDTH = 32
WORDS = sorted({word for prompt in DIGIT_PROMPTS for word in prompt.split()})
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_RATE = 3000, 64, 2e-3
DIVERGENCE_WEIGHT = 1e-4  # of the KL divergence per pixel, beside the squared error


# ---------------------------------------------------------------------------------------------------------------- texts


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a CLIP tokenizer in which each of `WORDS` is one token."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in WORDS}
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split.values()):
        counts: dict[tuple[str, str], int] = {}
        for pieces in split.values():
            for pair in zip(pieces, pieces[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = {word: _merged(pieces, best) for word, pieces in split.items()}
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Pieces with each occurrence of the pair joined, from the left."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def clip_tokenizer() -> Any:
    """The tokenizer of the CLIP encoders."""
    from transformers import CLIPTokenizer

    vocab, merges = byte_pairs()
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    """The tokenizer of the T5 encoder."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    pieces += [(letter, -6.0) for letter in LETTERS] + [(f"\u2581{word}", -3.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def clip_encoder(seed: int, projection: bool) -> Any:
    """A random CLIP text encoder: FLUX takes its pooled output; of two with a projection SD3 takes everything."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    vocab, _merges = byte_pairs()
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    width = TEXT_WIDTH // 2 if projection else TEXT_WIDTH
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=width, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
        for name, parameter in encoder.named_parameters():  # of unit size, so that words differ as much as they can
            if "token_embedding" in name:
                torch.nn.init.normal_(parameter, std=1.0)
            elif "position_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.3)
            elif "text_projection" in name:
                torch.nn.init.orthogonal_(parameter)
    return encoder.eval()


def t5_encoder(seed: int) -> Any:
    """A random T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ).eval()


# ---------------------------------------------------------------------------------------------------------- autoencoder


def train_autoencoder(folder: Path) -> None:
    """Train the autoencoder, of one latent cell per pixel, with shift and scale of its latents, and write its folder.

    It is trained on one grey channel; the folder has three equal ones, as pipelines draw pictures in colour.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,), layers_per_block=1, latent_channels=1, norm_num_groups=4, sample_size=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip
    randomness = Randomness(0)
    source = ShuffledBatches(load_digits(), randomness, torch.device("cpu"), 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=AUTOENCODER_RATE, weight_decay=0.0)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(AUTOENCODER_STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * step / AUTOENCODER_STEPS))
        optimizer.param_groups[0]["lr"] = AUTOENCODER_RATE * min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)
        x = source(step, AUTOENCODER_BATCH, randomness.at(step, 0, AUTOENCODER_BATCH)).x
        posterior = model.encode(x).latent_dist
        error = (model.decode(posterior.sample(torch.Generator().manual_seed(step))).sample - x).square().mean()
        loss = error + DIVERGENCE_WEIGHT * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 0.01 if step > 100 else 0.5)
        if step % 250 == 0:
            print(f"step {step:5d}  squared error {float(error.detach()):.6f}", flush=True)
    model.load_state_dict(average)
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(load_digits().x)).latent_dist.mode()
    model.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(float(1 / latents.std()), 4)
    )
    in_colour(model).save_pretrained(folder)


@torch.no_grad()
def in_colour(grey: Any) -> Any:
    """The autoencoder of three channels that encodes their mean, and decodes three equal ones."""
    from diffusers import AutoencoderKL

    coloured: Any = AutoencoderKL.from_config({**grey.config, "in_channels": 3, "out_channels": 3})
    state = grey.state_dict()
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].expand(-1, 3, -1, -1) / 3
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        state[name] = state[name].expand(3, *state[name].shape[1:])
    coloured.load_state_dict(state)
    return coloured
