"""A toy of every family that has one, by the name of its adapter."""

from collections.abc import Callable

from block_causals import toy_llada2, toy_sdar
from ddit_twins import ddit_twin
from decoder_twins import fast_dllm_twin, illada_twin, rnd1_twin
from decoders import FAMILIES as DECODERS
from dreams import toy_dream
from hf import build, diffusion_gemma
from layer_twins import llada2_twin, llada_moe_twin, sdar_twin
from torch import nn
from toys import toy
from upstream_twins import dream_twin, llada_twin

TOYS: dict[str, Callable[[], nn.Module]] = {
    "NativeDream": toy_dream, "NativeLLaDA": toy, "NativeLLaDA2": toy_llada2, "NativeSDAR": toy_sdar,
    "NativeILLaDA": DECODERS["illada"].toy, "NativeFastDLLM": DECODERS["fast_dllm_qwen"].toy,
    "NativeStableDiffCoder": DECODERS["stable_diffcoder"].toy, "NativeWeDLM": DECODERS["wedlm"].toy,
    "NativeNemotronDiffusion": DECODERS["nemotron_labs_diffusion"].toy,
    "DDiTBlocks": lambda: ddit_twin("sdpa"), "DreamLayers": dream_twin, "LLaDABlocks": llada_twin,
    "LLaDA2Layers": llada2_twin, "LLaDAMoELayers": llada_moe_twin, "SDARLayers": sdar_twin,
    "ILLaDALayers": illada_twin, "RND1Layers": rnd1_twin, "FastDLLMLayers": fast_dllm_twin,
    "TransformersDecoder": lambda: build("qwen3"), "TransformersBert": lambda: build("bert"),
    "TransformersModernBert": lambda: build("modernbert"), "TransformersDiffusionGemma": diffusion_gemma,
}  # fmt: skip
