"""The trained shortcut model learns beside the standard one, and its wiring is the runtime's."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeplan.examples.common.training import BATCH, LENGTH, Training, standard_library, windows
from moeplan.examples.shortcut_moe import steps, train
from moeplan.examples.shortcut_moe.shortcut_moe import FORMS, ShortcutMoe, form_model, save
from moeplan.runtime.check import gather_rows
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.executor import Executor
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.spec import Trace
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import check_shape
from moeplan.spec.shortcut import WINDOWS
from moeplan.tests.plans import even_slots, hand_made_plan

torch.set_num_threads(1)
STEPS, SEED = 8, 1
SEQUENCES, SHORT = 4, 16  # of the comparisons with other code


library = cache(standard_library)


def text() -> Tensor:
    return windows(library()[1], SEQUENCES, SHORT, torch.Generator().manual_seed(0))


def trained(form: str) -> ShortcutMoe:
    """After two steps, and with norms that are not all ones: a misplaced one changes the output."""
    net = ShortcutMoe(form_model(form), SEED)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    training, generator = Training(net, 2), torch.Generator().manual_seed(SEED)
    for step in range(2):
        training.step(step, windows(library()[0], BATCH, SHORT + 1, generator))
    return net.eval()


def test_command_trains_both_forms(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--steps", str(STEPS), "--evaluations", "1", "--seed", str(SEED), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *asked])
    train.main()
    printed = capsys.readouterr().out
    losses = [[float(x) for x in pair] for pair in re.findall(r"after \d+ steps +([\d.]+) +([\d.]+)", printed)]
    assert len(losses) == 2
    for before, after in zip(*losses, strict=True):
        assert before > 7  # uniform over 256 bytes is 8
        assert after < before - 1
    assert losses[1][0] != losses[1][1]
    assert len(set(re.search(r"parameters +(\S+) +(\S+)", printed).groups())) == 1  # type: ignore[union-attr]
    assert re.search(r"training step, ms +\d+ +\d+", printed)
    differences = re.findall(r"(\w+): logits of moeplan's reference .* differ by (\S+)", printed)
    assert [form for form, _ in differences] == list(FORMS)
    assert all(float(error) < 1e-5 for _, error in differences)

    written = json.loads((tmp_path / "losses.json").read_text())
    assert [round(written[form]["bits_per_byte"], 3) for form in FORMS] == losses[-1]
    assert steps.read_losses(tmp_path) == {form: written[form]["bits_per_byte"] for form in FORMS}
    for form in FORMS:
        trace = Trace.read(tmp_path / form / "trace.npz")
        check_shape(trace, form_model(form))
        assert trace.tokens == train.TRACE_SEQUENCES * LENGTH


def test_the_forms_differ_in_nothing_but_the_wiring() -> None:
    one, other = (ShortcutMoe(form_model(form), SEED) for form in FORMS)
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    assert train.parameters(one) == one.model.total_parameters() == other.model.total_parameters()
    blocks = [block.model_copy(update={"shortcut": "none"}) for block in other.model.blocks]
    assert tuple(blocks) == one.model.blocks
    assert {block.shortcut for block in other.model.layers if block.moe} == {"mid"}
    with torch.inference_mode():
        outputs = [net(text())[0] for net in (one, other)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01 * outputs[0].abs().max()


def on_rank(rank: Rank, job: dict[str, str]) -> dict[str, list[list[float]]]:
    """Logits of each sequence's last token, of every form and slot, on rank 0."""
    found = {}
    for form in FORMS:
        model = form_model(form)
        source = Checkpoint(model, Path(job["folder"]) / form, torch.float32)
        for slot in range(len(WINDOWS[model.layers[1].shortcut]) + 1):
            layer = LayerPlan(strategy="ep", slots=even_slots(8, rank.world), slot=slot)
            plan = hand_made_plan(model, f"prefill:{SEQUENCES * SHORT}@{SHORT}", [layer], tokens=(48, 16))
            executor = Executor(plan, rank.rank, source, device=torch.device("cpu"), capacity=SHORT)
            layout = executor.layout
            logits = executor.step(text().flatten()[layout.own], layout, 0).logits
            assert logits is not None
            found[f"{form} {slot}"] = gather_rows(logits, layout.last_counts).tolist()
    return found


def test_the_runtime_computes_what_plain_pytorch_does(tmp_path: Path) -> None:
    nets = {form: trained(form) for form in FORMS}
    for form, net in nets.items():
        save(net, tmp_path / form, max_length=SHORT)
    found = LocalLauncher(2).run("moeplan.tests.test_shortcut_moe:on_rank", {"folder": str(tmp_path)}, timeout=240)[0]
    assert len(found) == sum(len(WINDOWS[kind]) + 1 for kind in ("none", "mid"))
    for name, logits in found.items():
        with torch.inference_mode():
            wanted = nets[name.split()[0]](text())[0][:, -1]
        assert (torch.tensor(logits) - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def test_the_standard_form_is_a_qwen2_moe_to_transformers(tmp_path: Path) -> None:
    import transformers

    net = trained("standard")
    save(net, tmp_path, max_length=SHORT)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "Qwen2MoeForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        mine, theirs = net(text())[0], loaded.eval()(text()).logits
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, r"losses.json: not there; write it with python examples/shortcut_moe/train.py"), ("{}", "bits_per_byte")],
)
def test_steps_of_what_was_not_trained_are_refused(
    content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "losses.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["steps.py", str(tmp_path)])
    with pytest.raises(train.MoeplanError, match=said):
        steps.main()
