"""A live LLaDA or Dream object saves as the native model it equals, in every form."""

import pytest
import torch
from toys import manual_plan, one_thread, tokens, toy  # noqa: F401
from upstream_twins import dream_twin, llada_twin

import sinkprune as sp

MODELS = {
    "llada": lambda: llada_twin(),
    "llada, grouped, biases": lambda: llada_twin(n_kv_heads=2, include_bias=True),
    "dream": lambda: dream_twin(),
}
HEADS = [[0, 2], [1], [0, 1, 3]]
CHANNELS = [[0, 7, 9], None, [5]]


@pytest.mark.parametrize("form", ["dense", "mask", "compact"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_a_saved_live_object_loads_as_the_native_model(tmp_path, make, form):
    model, ids = make(), tokens(2, 9)
    if form != "dense":
        sp.apply(model, manual_plan(model, HEADS, CHANNELS), mode=form)
    expected = model(ids).logits
    loaded, _ = sp.load(sp.save(model, tmp_path / "out"))
    assert type(loaded).__module__.startswith("sinkprune.models.")
    assert sp.adapter_for(loaded).form == form
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)  # the live one is as it was


class Doubled(torch.nn.Linear):
    """Computes more than its weight says, as an unmerged LoRA does."""

    def forward(self, x):
        return 2 * super().forward(x)


VERBS = {
    "save": sp.save,
    "export": lambda model, folder: sp.export(model, folder, to="hf"),
    "gguf": lambda model, folder: sp.export(model, folder.with_suffix(".gguf"), to="gguf"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("form", ["dense", "compact"])
@pytest.mark.parametrize("make", [*MODELS.values(), toy], ids=[*MODELS, "native"])
def test_a_projection_that_computes_more_than_its_weight_is_not_written(tmp_path, make, form, verb):
    model = make()
    if form == "compact":
        sp.apply(model, manual_plan(model, [[0, 1]] * 3))
    last = [module for module in model.modules() if type(module) is torch.nn.Linear][-3]
    last.__class__ = Doubled
    with pytest.raises(ValueError, match="Doubled" if verb is not VERBS["export"] else "Doubled|compact"):
        verb(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
