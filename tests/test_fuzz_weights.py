"""Random weights folders and descriptions: right, refused in one line, or with an assumption that
is stated; never a traceback, and never a part that is random without a word.

What is right is what the source library gives for the same tensors. The long form says what it met:
`python -m pytest -n 0 -m long -s tests/test_fuzz_weights.py`.
"""

import copy
import json
import random
from collections import Counter
from typing import Any, NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from conftest import make_config
from lab.base.errors import RequestError
from lab.engine.checkpoint import host_copy
from lab.machine.distributed import Dist
from lab.models.building import get_model
from lab.models.network import Network
from lab.models.weights import WeightsFolder
from lab.outputs.evaluation import require_finite
from lab.outputs.trained import folder_settings, load_trained
from train_ast import load_config

SEED = 20261129
CPU = torch.device("cpu")
SIDE = 32
NAMES = ["ant", "bee", "cat", "dog", "eel"]
PICTURES = torch.randint(
    0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
ODD = [
    None,
    True,
    -1,
    0,
    3,
    1e9,
    float("nan"),
    float("inf"),
    "x",
    "",
    [],
    {},
    [1],
    ["a", 2],
    "\ud800",
]


class Case(NamedTuple):
    """A weights folder that is being spoilt."""

    folder: Any
    state: dict[str, torch.Tensor]  # what a network should hold
    facts: dict[str, Any]
    done: list[str]
    dice: random.Random


def make_bases(folder):
    """A folder that the lab has written, and two of timm's saver."""
    torch.manual_seed(0)
    config = make_config("model.name=test_resnet", f"dataset.image_size={SIDE}")
    network = Network(get_model(config.model, len(NAMES), SIDE), config, None, CPU, Dist())
    WeightsFolder(folder / "lab", network.describe(NAMES)).folder.mkdir()
    WeightsFolder(folder / "lab", network.describe(NAMES)).write(
        host_copy(network.model.state_dict()), {"epoch": 1}
    )
    for name, arguments in (
        ("test_resnet", {"global_pool": "max"}),
        ("test_vit", {"img_size": 32}),
    ):
        model = timm.create_model(name, num_classes=len(NAMES), **arguments)
        names = {"label_names": NAMES}
        save_for_hf(model, folder / name, model_config=names, safe_serialization=True)
    return [folder / "lab", folder / "test_resnet", folder / "test_vit"]


# ---------------------------------------------------------------- What leaves the meaning as it was


def as_pickle(case):
    """One of the files that folders have, with a wrapper and a prefix."""
    (case.folder / "model.safetensors").unlink()
    prefix = case.dice.choice(["", "module.", "_orig_mod.", "module._orig_mod.", "net.", "a.b."])
    content = {f"{prefix}{name}": tensor for name, tensor in case.state.items()}
    for key in case.dice.choice([[], ["state_dict"], ["model"], ["state_dict", "checkpoint"]]):
        content = {key: content, "epoch": 3}
    torch.save(content, case.folder / "pytorch_model.bin")


def prefixed(case):
    prefix = case.dice.choice(["module.", "_orig_mod.", "_orig_mod.module.", "model.", "x.y."])
    metadata = {"format": "pt"}
    state = {f"{prefix}{name}": tensor for name, tensor in case.state.items()}
    save_file(state, case.folder / "model.safetensors", metadata)


def without_counters(case):
    for name in [name for name in case.state if "num_batches" in name]:
        del case.state[name]
    save_file(case.state, case.folder / "model.safetensors")


def in_half(case):
    for name, tensor in case.state.items():
        if tensor.is_floating_point():
            case.state[name] = tensor.to(case.dice.choice([torch.float16, torch.bfloat16]))
    save_file(case.state, case.folder / "model.safetensors")


def with_more_facts(case):
    case.facts[case.dice.choice(["note", "license", "tags", "transformers_version"])] = (
        case.dice.choice(ODD[:-1])
    )
    write_facts(case)


def laid_out_anew(case):
    text = json.dumps(dict(reversed(case.facts.items())), indent=case.dice.choice([None, 1, 4]))
    (case.folder / "config.json").write_bytes(text.encode(case.dice.choice(["utf-8", "utf-8-sig"])))


HARMLESS = [as_pickle, prefixed, without_counters, in_half, with_more_facts, laid_out_anew]


# ------------------------------------------------------------------------------ What may change it


def write_facts(case):
    (case.folder / "config.json").write_text(json.dumps(case.facts))


def spoil_tensor(case):
    """A tensor missing, scaled, swapped, of another shape or type, or no longer finite."""
    name = case.dice.choice([name for name in case.state if "num_batches" not in name])
    tensor = case.state[name]
    kind = case.dice.choice(["missing", "scaled", "value", "swapped", "shape", "type", "renamed"])
    case.done.append(f"{kind} {name}")
    if kind in ("missing", "renamed"):
        del case.state[name]
    if kind == "renamed":
        case.state[f"{name}x"] = tensor
    elif kind == "scaled":
        case.state[name] = tensor * case.dice.choice([-1, 0, 0.5, 2, 1e3, 1e30, 1e38])
    elif kind == "value":
        tensor.view(-1)[case.dice.randrange(tensor.numel())] = case.dice.choice(
            [float("nan"), float("inf"), -float("inf"), -1.0]
        )
    elif kind == "swapped":
        other = case.dice.choice([*case.state])
        case.state[name], case.state[other] = case.state[other], tensor
    elif kind == "shape":
        case.state[name] = case.dice.choice(
            [tensor[:-1], tensor[None], tensor.flatten(), torch.zeros(0)]
        ).clone()
    elif kind == "type":
        case.state[name] = tensor.to(
            case.dice.choice([torch.int8, torch.int64, torch.bool, torch.float8_e5m2])
        )
    state = {each: value.contiguous().clone() for each, value in case.state.items()}
    save_file(state, case.folder / "model.safetensors")


def spoil_fact(case):
    """A fact missing, of another type, or out of its range."""
    places = [(case.facts, key) for key in case.facts]
    places += [(case.facts["pretrained_cfg"], key) for key in case.facts["pretrained_cfg"]]
    places += [(case.facts.get("model_args", {}), key) for key in case.facts.get("model_args", {})]
    place, key = case.dice.choice(places)
    kind = case.dice.choice(["missing", "odd", "element", "scaled"])
    case.done.append(f"{kind} {key}")
    value = place[key]
    if kind == "missing":
        del place[key]
    elif kind == "element" and isinstance(value, list) and value:
        value[case.dice.randrange(len(value))] = case.dice.choice(ODD)
    elif kind == "scaled" and isinstance(value, list) and isinstance(value[0], float):
        place[key] = [case.dice.choice([0, -1, 0.5, 255]) * each for each in value]
    else:
        place[key] = case.dice.choice(ODD)
    write_facts(case)


def spoil_names(case):
    names = list(NAMES)
    case.dice.shuffle(names)
    case.facts["label_names"] = case.dice.choice(
        [names, names[1:], [*names, "fly"], [*names[1:], names[1]], dict(enumerate(names)), []]
    )
    case.facts["num_classes"] = case.dice.choice([5, 5, 5, 4, 6, 0, 1, None])
    write_facts(case)


def spoil_architecture(case):
    case.facts["architecture"] = case.dice.choice(
        [
            "test_vit",
            "test_resnet",
            "resnet18",
            "test_efficientnet",
            "small_conv",
            "vit_b_16",
            "none",
        ]
    )
    write_facts(case)


def spoil_arguments(case):
    arguments = {
        "global_pool": ["avg", "max", "", "x", 3],
        "img_size": [16, 33, 64, [32, 48], "32", 10**9],
        "depth": [1, 2, "x", -1],
        "pretrained": [True],
        "checkpoint_path": ["/etc/passwd"],
        "in_chans": [1, 3, 4],
        "num_classes": [4, 5, 6],
        "no_such": [1],
    }
    key = case.dice.choice([*arguments])
    case.facts.setdefault("model_args", {})[key] = case.dice.choice(arguments[key])
    case.done.append(key)
    write_facts(case)


def spoil_bytes(case):
    """A file cut short, or with other bytes."""
    path = case.folder / case.dice.choice(["model.safetensors", "config.json"])
    data = bytearray(path.read_bytes())
    if case.dice.random() < 0.4:
        data = data[: case.dice.randrange(len(data))]
    else:
        for _ in range(case.dice.randint(1, 8)):
            data[case.dice.randrange(len(data))] = case.dice.randrange(256)
    path.write_bytes(data)


def lose_file(case):
    path = case.folder / case.dice.choice(["model.safetensors", "config.json"])
    path.unlink()
    if case.dice.random() < 0.3:
        path.mkdir()


SPOILT = [spoil_tensor, spoil_tensor, spoil_fact, spoil_fact, spoil_names, spoil_architecture]
SPOILT += [spoil_arguments, spoil_bytes, lose_file]


# ------------------------------------------------------------------------------------ What is right


def reference(case):
    """The logits of the source library for the tensors and facts of a folder; None where it has
    none.
    """
    facts = case.facts
    arguments = facts.get("model_args") or {}
    wanted = isinstance(arguments, dict) and not {"pretrained", "checkpoint_path"} & {*arguments}
    if not wanted:  # or timm would look for other weights
        return None
    arguments = {**arguments, "num_classes": len(NAMES)}
    try:
        if "spoil_bytes" in case.done:
            facts = json.loads((case.folder / "config.json").read_text())
            case.state.clear()
            case.state.update(load_file(case.folder / "model.safetensors"))
        model = timm.create_model(facts["architecture"], **arguments).eval()
        state = {name: tensor.float() for name, tensor in case.state.items()}
        counters = {n for n in model.state_dict() if "num_batches" in n}
        loaded = model.load_state_dict(
            {name: state[name] for name in state if name not in counters}, strict=False
        )
        if loaded.unexpected_keys or not {*loaded.missing_keys} <= counters:
            return None
        mean, std = (
            torch.tensor(facts["pretrained_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std")
        )
        with torch.no_grad():
            found = model((PICTURES.float() / 255 - mean) / std)
    except Exception:  # whatever is wrong with it
        return None
    return found if found.isfinite().all() else None


def asked(folder):
    """(logits, class names, remarks) of a folder as evaluate.py takes it."""
    settings = json.dumps(folder_settings(str(folder)))
    config = load_config(None, ["training.device=cpu"], settings)
    trained = load_trained(str(folder), config, CPU, by_folder=True)
    with torch.no_grad():
        size = trained.view.size
        if size != SIDE:  # the pictures are prepared for another size than the reference's
            return None, trained.classes, [*trained.remarks, f"{size} px"]
        found = trained.network.predictor()(PICTURES)
    require_finite(found.numpy())
    return found, trained.classes, trained.remarks


def refused(case, harmless, error):
    line = str(error)
    assert not harmless, (case.done, line)
    assert "\n" not in line
    assert "Traceback" not in line
    assert line.startswith(("--weights: ", "model.", "override")), line


def check_evaluation(case, expected, harmless, met):
    try:
        found, classes, remarks = asked(case.folder)
    except RequestError as error:
        refused(case, harmless, error)
        met["evaluation refused"] += 1
        return
    if found is None:
        met["evaluation at another size"] += 1
        return
    assert expected is not None, (case.done, remarks)
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max()), case.done
    assert classes == NAMES or remarks or "lab" not in case.folder.name, case.done
    met[f"evaluation right{' with a remark' if remarks else ''}"] += 1


def check_start(case, harmless, met, capsys):
    """A run starts from the folder: every tensor is that of the file, or is named."""
    name = "test_vit" if "vit" in case.folder.name else "test_resnet"
    start = ["training.device=cpu", f"model.name={name}", f"model.weights={case.folder}"]
    config = load_config(None, [*start, f"dataset.image_size={SIDE}"])
    capsys.readouterr()
    try:
        state = get_model(config.model, len(NAMES), SIDE).state_dict()
    except RequestError as error:
        refused(case, harmless, error)
        met["start refused"] += 1
        return
    said = capsys.readouterr().out
    for each, tensor in state.items():
        there = case.state.get(each)
        same = there is not None and torch.equal(tensor, there.to(tensor.dtype))
        assert same or each in said or "num_batches" in each, (case.done, each, said)
    met["start right"] += 1


def fuzz(times, folder, capsys):
    """`times` cases. Returns how each ended."""
    bases = make_bases(folder)
    met = Counter()
    for number in range(times):
        dice = random.Random(SEED + number)
        base = dice.choice(bases)
        place = folder / f"{base.name}-{number}"
        place.mkdir()
        for path in base.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        facts = json.loads((place / "config.json").read_text())
        case = Case(place, load_file(place / "model.safetensors"), copy.deepcopy(facts), [], dice)
        harmless = dice.random() < 0.3
        for change in dice.sample(HARMLESS if harmless else SPOILT, 1):
            case.done.append(change.__name__)
            change(case)
        check_evaluation(case, reference(case), harmless, met)
        check_start(case, harmless, met, capsys)
    return met


def test_twenty_random_weights_folders_are_right_refused_or_said(tmp_path, capsys):
    met = fuzz(20, tmp_path, capsys)
    assert {"evaluation right", "evaluation refused", "start right", "start refused"} <= met.keys()


@pytest.mark.long
def test_three_hundred_random_weights_folders_are_right_refused_or_said(tmp_path, capsys):
    met = fuzz(300, tmp_path, capsys)
    with capsys.disabled():
        print(f"\nseed {SEED}: {dict(sorted(met.items()))}")
