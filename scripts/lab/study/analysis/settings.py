"""Which runs are comparable, and what a setting is called: comparison groups, their titles, labels
of settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from lab.base.errors import one_line
from lab.config.keys import BUILT_IN, all_needs, of_known_parts, unmet
from lab.config.sections import auto_augment
from lab.study.results import DEFAULTS, ResultsFile, is_whole

Group = tuple[tuple[str, str], ...]  # keys and values that its runs share; () where they do not say

LABEL_CHARACTERS = 120
VALUE_CHARACTERS = 40
SHORT_VALUE = 12
UNKNOWN = "no whole config: not known to be comparable"

# Of the dataset, what does not change what is seen.
NOT_SEEN = {
    f"dataset.{key}"
    for key in (
        "cache cache_dir cache_folder cache_format cache_resolution max_bad_images num_classes"
    ).split()
}
# What is done to training pictures alone, as training.mixup is: settings that one wants to compare.
RECIPE = {"dataset.augment_policy", "dataset.random_erasing"}
SOURCES = {  # by dataset.type, the keys that name the data
    "digits": (),
    "folder": ("train_dir", "val_dir", "val_fraction"),
    "hf": (
        *("name", "subset", "revision", "split_train", "split_val", "val_fraction"),
        *("image_key", "label_key"),
    ),
    "csv": ("name", "split_train", "split_val", "val_fraction", "image_key", "label_key"),
}

# What a label says first, in this order. The other keys follow in the config's order, the epochs
# stand last.
FIRST = (
    "mode scoring rule measure target_activation forget_rate warmup_epochs anneal_epochs".split()
)
FIRST = [f"ast.{key}" for key in FIRST]
LAST = ["training.epochs", "gpu"]
# What changes no training: in a label only where nothing else tells two settings apart.
NO_CAUSE = {
    f"training.{key}"
    for key in "num_workers compile compile_scoring device max_nonfinite_steps".split()
}
NO_CAUSE |= {"metrics.base_flop_per_sample", "metrics.gpu_tdp_watts", *NOT_SEEN}

# What changes no training step: the schedule, and how far a step goes.
NO_STEP = {
    f"training.{key}"
    for key in (
        "epochs lr lr_schedule min_lr lr_warmup_epochs lr_decay layer_decay momentum weight_decay "
        "loss_weight label_smoothing max_minutes max_nonfinite_steps early_stop_patience "
        "compile_scoring"
    ).split()
}

NEEDS = {  # also of keys of earlier days
    **all_needs(),
    "ast.explore_weight_cap": {"ast.scoring": ("history",), "ast.rule": ("pi",)},
    "ast.proxy_every": {"ast.scoring": ("proxy",)},
    "ast.proxy_resolution": {"ast.scoring": ("proxy",)},
    "ast.score_ahead": {"ast.scoring": ("batch", "proxy")},
    "training.loss_weight": {"training.loss": ("early_learning",)},
}
AST_KEYS = {  # that have a say, by ast.mode
    "dense": "mode",
    "dense twin": "mode",
    "random": "mode target_activation warmup_epochs anneal_epochs",
}


def comparison_group(settings: Mapping[str, str]) -> Group:
    """What runs must share for their accuracies to be comparable: the training data, the model, the
    validation set.

    These are the keys of `model` and `dataset`, but for those that do not change what is seen
    (NOT_SEEN), those of the recipe (RECIPE) and those that another kind of dataset reads. `augment:
    auto` counts as what it stands for. `cache_resolution` counts where crops are cut out of
    pictures of that size. () for a config that is not whole: nothing is known to be shared.
    Seconds and joules need the same GPU and number of processes besides; see
    `lab.study.analysis.study.dense_trainings`.
    """
    if not is_whole(settings):
        return ()
    kind = settings["dataset.type"]
    size = settings.get("dataset.image_size", "")
    read = SOURCES.get(kind)
    unread = {
        f"dataset.{key}"
        for keys in SOURCES.values()
        for key in keys
        if read is not None and key not in read
    }
    shared = {
        key: value
        for key, value in settings.items()
        if key.startswith(("model.", "dataset.")) and key not in NOT_SEEN | RECIPE | unread
    }
    if shared.get("dataset.augment") == "auto" and size.isdecimal():
        shared["dataset.augment"] = auto_augment(kind, int(size))
    if (
        settings.get("dataset.cache", "none") != "none"
        and shared.get("dataset.augment") == "random_resized_crop"
    ):
        shared["dataset.cache_resolution"] = settings.get("dataset.cache_resolution", "null")
        shared["dataset.cache_format"] = settings.get("dataset.cache_format", "raw")
    return tuple(shared.items())


def group_titles(firsts: Mapping[Group, ResultsFile]) -> dict[Group, str]:
    """A title for every group: its data, its model, and where it differs from the others and from
    the defaults.

    `firsts`: by group, one of its runs.
    """
    groups = [dict(group) for group in firsts]
    named = {"dataset.type", "dataset.name", "dataset.subset", "dataset.val_dir", "model.name"}
    keys = list(dict.fromkeys(key for group in groups for key in group))
    differing = [key for key in keys if len({group.get(key) for group in groups if group}) > 1]

    def title(group: Group, run: ResultsFile, least: bool) -> str:
        pairs = dict(group)
        own = [key for key in differing if key in pairs and not (least and key in named)]
        own = [key for key in own if not least or run.settings.get(key) != DEFAULTS.get(key)]
        words = [f"{key.partition('.')[2]}={one_line(pairs[key], VALUE_CHARACTERS)}" for key in own]
        return one_line(
            ", ".join(filter(None, [run.dataset, pairs["model.name"], " ".join(words)])), 200
        )

    titles = {group: title(group, run, True) if group else UNKNOWN for group, run in firsts.items()}
    counts = Counter(titles.values())
    long = {
        group: title(group, firsts[group], False)
        for group, short in titles.items()
        if counts[short] > 1
    }
    return dict(zip(firsts, distinct((titles | long).values()), strict=True))


def dense_step(settings: Mapping[str, str]) -> Group:
    """What a dense step costs: the settings that runs must share for its time to be the same."""
    return tuple(
        (key, value)
        for key, value in settings.items()
        if not key.startswith(("ast.", "metrics.")) and key not in NO_STEP
    )


def acts(settings: Mapping[str, str], key: str) -> bool:
    """Whether a key of the config can change a run of these settings. Of an imported part nothing
    is known: there any key can.
    """
    mode = settings.get("ast.mode", "")
    if key.startswith("ast.") and mode in AST_KEYS:
        return key.removeprefix("ast.") in AST_KEYS[mode].split()
    if key in ("training.epochs", "training.max_minutes"):
        by_time = settings.get("training.lr_decay") == "time"
        return by_time == (key == "training.max_minutes")
    if mode == "dense twin" and key in ("training.lr_decay", "training.lr_warmup_epochs"):
        return False  # they follow from the time of its sparse run
    known = of_known_parts({key: NEEDS.get(key, {})}, settings, BUILT_IN)
    return not any(unmet(key, settings, known))


def telling_keys(settings: Sequence[Mapping[str, str]], keys: Iterable[str]) -> list[str]:
    """Those of the keys in which settings differ, among the ones where the key has a say."""
    values = {key: {each.get(key) for each in settings if acts(each, key)} for key in keys}
    return [key for key, found in values.items() if len(found) > 1]


def in_order(keys: Iterable[str]) -> list[str]:
    rest = [key for key in keys if key not in FIRST + LAST]
    ast_first = sorted(rest, key=lambda key: not key.startswith("ast."))
    return [
        *FIRST[:6],
        *(key for key in ast_first if key.startswith("ast.")),
        *FIRST[6:],
        *(key for key in ast_first if not key.startswith("ast.")),
        *LAST,
    ]


def fitted(words: Sequence[str]) -> str:
    """The words as a label: long values are abbreviated, and what does not fit LABEL_CHARACTERS is
    counted.
    """
    words = [one_line(word, VALUE_CHARACTERS + len(word.partition("=")[0])) for word in words]
    if len(" ".join(words)) > LABEL_CHARACTERS:
        words = [one_line(word, SHORT_VALUE + len(word.partition("=")[0])) for word in words]
    kept = list(words)
    while len(kept) > 1 and len(" ".join(kept)) > LABEL_CHARACTERS - len(" +99 more") * (
        len(kept) < len(words)
    ):
        kept.pop()
    return " ".join(kept) + (f" +{len(words) - len(kept)} more" if len(kept) < len(words) else "")


def distinct(labels: Iterable[str], names: Sequence[str] | None = None) -> list[str]:
    """The labels, those that came before with the name of their run or a number behind them."""
    found: dict[str, None] = {}
    for number, label in enumerate(labels):
        candidates = [
            label,
            *([f"{label} ({names[number]})"] if names and names[number] != label else []),
        ]
        candidates += [f"{label} ({count})" for count in range(2, number + 3)]
        found[next(each for each in candidates if each not in found)] = None
    return list(found)


def label_settings(settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A label for every setting: its mode, then every key that sets it apart from its neighbours.

    These are the keys in which the settings differ, as far as they have a say in the setting's own
    training: a dense run ignores `ast.forget_rate`, and with `lr_decay: time` the epochs follow
    from the minutes. Keys that change no training (NO_CAUSE) are named only where nothing else
    tells two settings apart. A label has at most LABEL_CHARACTERS characters, and a few more where
    a name has to tell two apart.

    `settings`: distinct configs as dotted key to text. An empty one is labelled with its entry of
    `names`.
    """
    known = [each for each in settings if each]
    keys = list(dict.fromkeys(key for each in known for key in each))
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    every = in_order(key for key in keys if key != "ast.mode")
    telling = telling_keys(known, [key for key in every if key not in NO_CAUSE])

    def words(each: Mapping[str, str], also: Iterable[str] = ()) -> list[str]:
        own = [key for key in telling if key != "ast.mode" and acts(each, key)] + list(also)
        pairs = [(key, key.rpartition(".")[2]) for key in own]
        mode = one_line(each.get("ast.mode", "?"), VALUE_CHARACTERS)
        return [
            mode,
            *(
                f"{leaf if leaves[leaf] == 1 else key}={each.get(key, 'unset')}"
                for key, leaf in pairs
            ),
        ]

    alike: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for each in known:
        alike.setdefault(tuple(words(each)), []).append(each)
    labels = []
    for each, name in zip(settings, names, strict=True):
        twins = alike[tuple(words(each))] if each else []
        also = [key for key in every if len({other.get(key) for other in twins}) > 1]
        labels.append(fitted(words(each, also)) if each else one_line(name, LABEL_CHARACTERS))
    return distinct(labels, [one_line(name, 60) for name in names])


def short_labels(labels: Sequence[str]) -> list[str]:
    """For each label its mode, and the fewest further words that no other label holds as well: the
    first word, then a first one and one or two others; the whole label where these do not tell it
    apart.
    """
    sets = [set(label.split(" ")) for label in labels]
    short = []
    for number, label in enumerate(labels):
        mode, *words = label.split(" ")
        mine = [
            (),
            *(
                words[:1] + list(more)
                for count in (0, 1, 2)
                for more in combinations(words[1:], count)
            ),
        ]
        others = sets[:number] + sets[number + 1 :]
        found = next(
            (each for each in mine if not any({mode, *each} <= other for other in others)), words
        )
        short.append(" ".join([mode, *found]))
    return short
