"""Logits of a GGUF file from llama.cpp itself: the C API in the ``xllamacpp`` wheel, by ctypes."""

import ctypes as C
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="xllamacpp is not installed: no llama.cpp to load exports"
)


class _Parameters(C.Structure):
    """A struct that the API passes by value, with room for any version's; fields are set by their offset."""

    _fields_ = (("bytes", C.c_uint8 * 512),)

    def put(self, offset, value):
        C.memmove(C.byref(self, offset), C.byref(C.c_int32(value)), 4)

    def get(self, offset):
        return C.c_int32.from_buffer(self, offset).value


class _Batch(C.Structure):
    _fields_ = (
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.POINTER(C.c_float)),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    )


_LOG = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)
_POINTERS = (
    "llama_model_load_from_file",
    "llama_init_from_model",
    "llama_model_get_vocab",
    "llama_get_memory",
)
# Offsets of llama_context_params in the pinned wheel (build 11549), checked against its defaults below.
_N_CTX, _N_BATCH, _N_UBATCH, _FLASH, _TYPE_K, _TYPE_V = 0, 4, 8, 52, 104, 108
_F32, _F16 = 0, 1

_messages = []


def _library():
    lib = C.CDLL(next(str(p) for p in Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")))
    for name in _POINTERS:
        getattr(lib, name).restype = C.c_void_p
    lib.llama_get_logits_ith.restype = C.POINTER(C.c_float)
    lib.llama_get_causal_attn = getattr(lib, "llama_get_causal_attn", None)
    for name in ("llama_model_is_diffusion", "llama_get_causal_attn"):
        getattr(lib, name).restype = C.c_bool
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Parameters
    lib.llama_batch_init.restype = _Batch
    lib.llama_model_meta_val_str.argtypes = (C.c_void_p, C.c_char_p, C.c_char_p, C.c_size_t)
    lib.llama_tokenize.argtypes = (
        C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool,
    )  # fmt: skip
    lib.llama_log_set(_log, None)
    lib.llama_backend_init()
    return lib


@_LOG
def _log(level, text, _):
    _messages.append(text.decode(errors="replace"))


_lib = None


class LlamaCpp:
    """A loaded GGUF file."""

    def __init__(self, path, context=64):
        global _lib
        _lib = _lib or _library()
        _messages.clear()
        self.model = C.c_void_p(
            _lib.llama_model_load_from_file(str(path).encode(), _lib.llama_model_default_params())
        )
        if not self.model:
            raise RuntimeError("llama.cpp: " + "".join(_messages)[-600:])
        self.vocab = C.c_void_p(_lib.llama_model_get_vocab(self.model))
        self.vocabulary = _lib.llama_vocab_n_tokens(self.vocab)
        self.mask_token = _lib.llama_vocab_mask(self.vocab)
        self.is_diffusion = _lib.llama_model_is_diffusion(self.model)
        parameters = _lib.llama_context_default_params()
        assert (parameters.get(_N_CTX), parameters.get(_N_BATCH), parameters.get(_N_UBATCH)) == (
            512,
            2048,
            512,
        )
        assert (parameters.get(_TYPE_K), parameters.get(_TYPE_V), parameters.get(_FLASH)) == (_F16, _F16, -1)
        for offset in (_N_CTX, _N_BATCH, _N_UBATCH):
            parameters.put(offset, context)
        for offset, value in ((_TYPE_K, _F32), (_TYPE_V, _F32), (_FLASH, 0)):
            parameters.put(offset, value)
        self.context = C.c_void_p(_lib.llama_init_from_model(self.model, parameters))
        if not self.context:
            raise RuntimeError("llama.cpp: " + "".join(_messages)[-600:])
        _lib.llama_set_n_threads(self.context, 1, 1)

    def close(self):
        _lib.llama_free(self.context)
        _lib.llama_model_free(self.model)

    @property
    def causal(self):
        return _lib.llama_get_causal_attn(self.context)

    def metadata(self, key):
        text = C.create_string_buffer(4096)
        return (
            text.value.decode()
            if _lib.llama_model_meta_val_str(self.model, key.encode(), text, 4096) >= 0
            else None
        )

    def tokenize(self, text, special=False):
        data, room = text.encode(), (C.c_int32 * (4 * len(text.encode()) + 8))()
        count = _lib.llama_tokenize(self.vocab, data, len(data), room, len(room), False, special)
        assert count >= 0
        return list(room[:count])

    def logits(self, ids, block=None, causal=None):
        """``[len(ids), vocabulary]``; with ``block`` so many tokens at a time, each seeing those before."""
        if causal is not None:
            _lib.llama_set_causal_attn(self.context, C.c_bool(causal))
        memory = C.c_void_p(_lib.llama_get_memory(self.context))
        if memory:
            _lib.llama_memory_clear(memory, C.c_bool(True))
        ids, rows = [int(i) for i in ids], []
        for first in range(0, len(ids), block or len(ids)):
            part = ids[first : first + (block or len(ids))]
            batch = _lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, 1
                batch.seq_id[i][0] = 0
            status = _lib.llama_decode(self.context, batch)
            assert status == 0, f"llama_decode returned {status}: " + "".join(_messages)[-600:]
            for i in range(len(part)):
                row = _lib.llama_get_logits_ith(self.context, i)
                rows.append(torch.tensor(row[: self.vocabulary]))
            _lib.llama_batch_free(batch)
        return torch.stack(rows)


@contextmanager
def opened(path, context=64):
    model = LlamaCpp(path, context)
    try:
        yield model
    finally:
        model.close()
