"""The sections of the config: every key with its unit, meaning and default."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from lab.base.files import expand_home

Compile = Literal["off", "default", "reduce-overhead"]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    PATHS: ClassVar[tuple[str, ...]] = ()  # the keys that are paths, or may be

    @field_validator("*")
    @classmethod
    def _sound_text(cls, value: Any) -> Any:
        """Text that no file or library could take is refused here."""
        if isinstance(value, str) and (not value or "\0" in value or _surrogate(value)):
            raise PydanticCustomError(
                "text", "text in UTF-8 without zero bytes, and not empty (no value: null)"
            )
        return value

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any, info: ValidationInfo) -> Any:
        """`~` at the beginning of a path is the home folder."""
        if not isinstance(value, str) or info.field_name not in cls.PATHS:
            return value
        try:
            return expand_home(value)
        except ValueError as error:
            section = cls.__name__.removesuffix("Config").lower()
            raise ValueError(f"{section}.{info.field_name}: {error}") from None


class ModelConfig(Section):
    PATHS = ("weights",)

    name: str = Field(
        "resnet18",
        description="resnet18, resnet50, vit_b_16 (of torchvision), small_conv, or any model of "
        "timm. With pretrained=true also hf-hub:NAME/REPOSITORY or local-dir:FOLDER, as timm "
        "writes them",
    )
    pretrained: bool = Field(
        False, description="start from published ImageNet weights, which are downloaded"
    )
    weights: str | None = Field(
        None,
        description=(
            "start from these weights: the weights folder of a run, a .safetensors or a "
            "state_dict file"
        ),
    )
    freeze: bool = Field(
        False,
        description="train the head alone, on the features of trained weights (a linear probe). "
        "The rest stays as it is; its BatchNorm and dropout work as in validation",
    )
    small_stem: bool = Field(
        False,
        description="torchvision's ResNets for pictures of 32 to 64 px: a 3x3 stem without "
        "max-pool",
    )


class DatasetConfig(Section):
    PATHS = ("train_dir", "val_dir", "name", "cache_folder")

    type: str = Field(
        "digits",
        description="digits: comes with scikit-learn. folder: one folder a class (ImageFolder). "
        "hf: Hugging Face datasets. csv: a table of files and labels",
    )
    train_dir: str | None = Field(None, description="folder with one sub-folder of images a class")
    val_dir: str | None = Field(
        None, description="folder with the same sub-folders, for validation"
    )
    val_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="validate on this share of each class of the training pictures, at least "
        "one, and do not train on them. They are chosen by their bytes: the same in every run, "
        "and copies of a picture are on one side",
    )
    name: str | None = Field(
        None,
        description="hf: hub id, or a local folder of parquet files. csv: the file, in UTF-8, "
        "with the columns file and label, and perhaps split; paths in it begin at its own "
        "folder",
    )
    subset: str | None = Field(
        None, description="configuration of the dataset, where it has several"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    split_train: str = Field("train", description="split to train on")
    split_val: str = Field("validation", description="split to validate on")
    image_key: str | None = Field(
        None,
        description="image column. null: for hf the only column of images, for csv the one "
        "called file",
    )
    label_key: str | None = Field(
        None,
        description="label column. null: for hf the only one of class labels, for csv the one "
        "called label",
    )
    num_classes: int | None = Field(
        None, ge=2, description="is compared with the data; null: taken from the data"
    )
    image_size: int = Field(32, ge=1, description="side of the square model input, pixels")
    augment: Literal["auto", "none", "pad_crop", "random_resized_crop"] = Field(
        "auto", description="auto: none for digits, pad_crop up to 64 px, random_resized_crop above"
    )
    augment_policy: str = Field(
        "none",
        description="torchvision's policies, applied after the crop. rand_augment: two "
        "operations of magnitude 9 (of 30). trivial_augment: one of any magnitude. Loader "
        "processes apply them, so they need cache=none",
    )
    random_erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="chance that a grey rectangle covers 2 to 33 % of a training picture",
    )
    normalise: Literal["imagenet", "measured"] = Field(
        "imagenet",
        description="mean and deviation of the pixels, for weights that start at random. "
        "measured: those of the training pictures. Trained weights keep their own",
    )
    padding: Literal["black", "reflect"] = Field(
        "black", description="what lies beyond the picture's edge"
    )
    cache: Literal["none", "device", "disk"] = Field(
        "none",
        description="decode each picture once; crop and flip on the training device. device: "
        "keep the pixels on that device. disk: keep them in files that later runs find again",
    )
    cache_folder: str = Field(
        "data/cache",
        description="folder of the files of cache=disk. cache=device reads pictures from it that "
        "are there",
    )
    cache_format: Literal["raw", "jpeg"] = Field(
        "raw",
        description=(
            "raw: pixels. jpeg: JPEG of quality 95, a sixth of the disk, decoded in every epoch"
        ),
    )
    cache_resolution: int | None = Field(
        None,
        ge=1,
        description=(
            "longest shorter side of the kept pictures, pixels. null: image_size, or "
            "25/14 of it where crops are cut out"
        ),
    )
    worker_timeout: float = Field(
        300.0,
        gt=0,
        description="seconds without a batch from a loader worker after which the run fails and "
        "names the file. It happens on a dead network disk",
    )
    max_bad_images: int = Field(
        0,
        ge=0,
        description=(
            "how many images may be unreadable. The next sample stands in for each, and "
            "the results list them"
        ),
    )
    max_train_samples: int | None = Field(
        None, ge=1, description="train on a fixed random subset of this size"
    )
    repeat: Annotated[int, Field(ge=1)] | Literal["balanced"] = Field(
        1,
        description="how often each training image is in the set, to study redundant data. "
        "balanced: as often as its class needs to be as large as the largest",
    )
    label_noise: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training labels that are replaced by another class at random, "
        "to study wrong labels",
    )
    max_val_samples: int | None = Field(
        None, ge=1, description="validate on a fixed random subset of this size"
    )

    def resolved_augment(self) -> str:
        """What `augment: auto` stands for."""
        return auto_augment(self.type, self.image_size) if self.augment == "auto" else self.augment


class ASTConfig(Section):
    mode: Literal["ast", "dense", "random"] = Field(
        "ast",
        description="ast: train on a selection. dense: train on everything, the baseline. "
        "random: train on a random share, the control",
    )
    measure: str = Field(
        "loss_entropy",
        description="what a sample is worth. loss_entropy: loss + entropy_weight * entropy, the "
        "significance",
    )
    scoring: str = Field(
        "batch",
        description="where a sample's score comes from. batch: a forward of the network over "
        "every loaded sample. proxy: a forward of a small network that learns beside it. "
        "history: the loss when the sample was last trained on, so that only chosen samples "
        "are loaded",
    )
    proxy_model: str = Field(
        "small_conv",
        description="the small network: small_conv (four convolutions), or a name as for "
        "model.name",
    )
    rule: str = Field(
        "pi",
        description="which of the scored samples are active. pi: those above the controlled "
        "threshold. topk: a top share. infobatch: those above the mean, and half of the others "
        "with twice the weight; the schedule expects 0.75 of the set",
    )
    forget_rate: Annotated[float, Field(ge=0, lt=1)] | str = Field(
        0.0,
        description="share of all samples that is left out before the rule chooses, because "
        "their labels may be wrong: those with the highest scores. auto: from half of the "
        "schedule on, all samples whose label is not believed. auto gained with 40 and more "
        "epochs, and cost some accuracy with 20. With training.loss=early_learning it lowered "
        "the accuracy",
    )
    explore: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the samples that is trained on whatever its stored scores say",
    )
    score_resolution: int | None = Field(
        None,
        ge=1,
        description="side of the pictures that are scored, pixels; null: dataset.image_size",
    )
    score_statistics: Literal["running", "batch"] = Field(
        "running",
        description="BatchNorm's statistics while scoring. running: the running averages, as in "
        "validation. batch: those of the scored batch, as in training",
    )
    pack: bool = Field(
        False, description="collect active samples into full batches before a training step"
    )
    candidates: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of all samples that a sparse epoch loads and scores: those with the "
        "highest scores so far. A score doubles with every epoch that leaves its sample out",
    )
    reuse_forward: bool | Literal["auto"] = Field(
        False,
        description="score and train by one forward; the active rows alone go backward. For an "
        "active share a it costs 1 + 2a forwards, not 1 + 3a. Sparse epochs load larger "
        "batches, so that training.batch_size samples of each are active. true: refuse a "
        "network that cannot be traced. auto: take two passes for it. With BatchNorm and a "
        "high rate set training.grad_clip_norm=1: without it some runs fell back at first",
    )
    target_activation: Annotated[float, Field(gt=0, le=1)] | str = Field(
        0.25,
        description="share of all samples to be active, 0 to 1; at most what forget_rate leaves. "
        "auto: all while many are predicted wrongly, later three times the share that is, at "
        "least 0.5. It is set at each epoch's end, and mixed pictures do not count. Whether to "
        "select is decided once, by 250 pictures (at most a fortieth) kept out until then. It "
        "stays at all where these are wrong more often than the active ones, and where no "
        "selection began in the first half of the sparse epochs",
    )
    kp: float = Field(
        0.1, ge=0, description="proportional gain, threshold units per unit of activation error"
    )
    ki: float = Field(
        0.01, ge=0, description="integral gain, threshold units per unit of summed error"
    )
    kp_warmup_epochs: float = Field(0, ge=0, description="sparse epochs over which kp rises from 0")
    ki_warmup_epochs: float = Field(0, ge=0, description="sparse epochs over which ki rises from 0")
    initial_threshold: float | Literal["auto"] = Field(
        "auto", description="nats. auto: the (1 - target) quantile of the first scored batch"
    )
    min_threshold: float = Field(0.0, description="lower bound of the threshold, nats")
    threshold_unit: Literal["iqr", "raw"] = Field(
        "iqr",
        description=(
            "unit of the gains. iqr: running inter-quartile range of the significance. raw: nats"
        ),
    )
    entropy_weight: float = Field(
        1.0, ge=0, description="weight of the entropy in loss + weight * entropy"
    )
    min_active: int = Field(
        2,
        ge=0,
        description="train on at least so many samples of a batch, those with the highest "
        "scores; with scoring=history of an epoch",
    )
    warmup_epochs: int = Field(
        1, ge=0, description="dense epochs before the sparse (or random) ones"
    )
    anneal_epochs: int = Field(
        0, ge=0, description="dense epochs after the sparse (or random) ones"
    )


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1, description="passes over the training set")
    batch_size: int = Field(128, ge=1, description="samples in a step, of all processes together")
    optimizer: str = Field(
        "sgd",
        description="sgd, adam, adamw, lamb, muon, or another one of timm. Norms, biases and a "
        "ViT's class token and positions are not decayed; with muon, AdamW trains them",
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    lr_schedule: str = Field(
        "cosine",
        description="how the rate falls after its warm-up: cosine, linear, constant or step. "
        "step: to a tenth after each third of the rest",
    )
    min_lr: float = Field(
        0.0, ge=0, description="learning rate at the end of the schedule; with step never below it"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the learning rate from a layer to the one before it; 1: all alike",
    )
    lr_warmup_epochs: float = Field(
        0,
        ge=0,
        description="epochs over which the rate rises from 0. With lr_decay=time the same share "
        "of max_minutes",
    )
    lr_decay: Literal["epochs", "time"] = Field(
        "epochs",
        description=(
            "epochs: the run ends after training.epochs. time: the schedule and the run "
            "end after max_minutes of training, without validation"
        ),
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and muon")
    nesterov: bool = Field(False, description="Nesterov's form of momentum")
    weight_decay: float = Field(
        5e-4, ge=0, description="L2 penalty (sgd, adam), or decoupled decay (the others)"
    )
    weight_average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay per optimizer step of an exponential moving average of the weights; "
        "0: none. The average is validated and exported; selection scores by the weights "
        "themselves",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description=(
            "alpha of MixUp among the samples of a training step, after they were chosen; 0: none"
        ),
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description=(
            "alpha of CutMix, likewise; 0: none. With both, each step takes one of them at random"
        ),
    )
    loss: str = Field(
        "cross_entropy",
        description="what is minimised. focal: samples that are learned count less. "
        "binary_cross_entropy: of each class by itself, timm's. Two are for wrong labels. On "
        "CIFAR-10 with 17 % of them early_learning helped, most in 80 epochs; "
        "generalised_cross_entropy did not",
    )
    noisy_labels: bool = Field(
        False,
        description="labels may be wrong. Sets ast.mode=dense, training.loss=early_learning, "
        "training.weight_average=0.997, training.list_suspects=true and "
        "dataset.random_erasing=0.25, each where it is not given. The early-learning term, and "
        "with training.mixup the share of mixed steps, follow how many labels look wrong. Both "
        "are 0 where none does. See contradicted and remedy in the results",
    )
    list_suspects: bool = Field(
        False,
        description="write a list of the training samples whose labels may be wrong, and a sheet "
        "of their pictures. Both lie beside the results file. ast.forget_rate writes them too",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none",
        description="weights of the training loss, not of the significance. balanced: the "
        "inverse of each class's share of the training samples",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="of the training loss, not of the significance"
    )
    grad_clip_norm: float | None = Field(
        None, gt=0, description="largest gradient norm; null: no clipping"
    )
    grad_accum_steps: int = Field(1, ge=1, description="forward passes in an optimizer step")
    mixed_precision: bool | Literal["bfloat16", "float16"] = Field(
        True,
        description="autocast. true: on a GPU, in bfloat16, or in float16 with a GradScaler "
        "where it has no bfloat16. A name: in that type, on a CPU too",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="auto: a GPU where there is one"
    )
    compile: Compile = Field(
        "off",
        description=(
            "mode of torch.compile for the training step; all steps must have one shape. "
            "reduce-overhead: CUDA graphs"
        ),
    )
    sync_batchnorm: bool = Field(
        False,
        description="several GPUs: BatchNorm over the samples of all of them, not over each "
        "GPU's own",
    )
    num_workers: int | None = Field(
        None, ge=0, description="loader processes; null: one a core, at most 16"
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description=(
            "longest wall time from start or resumption to the results, minutes. With "
            "lr_decay=time it is training time, see there"
        ),
    )
    early_stop_patience: int | None = Field(
        None, ge=1, description="stop after so many epochs without a new best accuracy"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of weights, order, augmentation and random selection"
    )


# what `training.noisy_labels: true` sets where a config does not say
NOISY_LABELS = {
    "ast": {"mode": "dense"},
    "dataset": {"random_erasing": 0.25},
    "training": {
        "loss": "early_learning",
        "weight_average": 0.997,
        "list_suspects": True,
    },
}


class MetricsConfig(Section):
    base_flop_per_sample: float | None = Field(
        None,
        gt=0,
        description="forward and backward FLOP of one sample. null: counted from the model, a "
        "multiply-add as two, without the first layer's input gradient. For a ResNet-50 at 224 "
        "px that is 24.3e9; the often quoted 7.8e9 is one forward",
    )
    gpu_tdp_watts: float = Field(
        250.0, gt=0, description="power of one GPU (of one process) in the energy estimate, watts"
    )


class LoggingConfig(Section):
    PATHS = ("output_dir", "jsonl_path")

    output_dir: str = Field("results", description="folder of final_results_<timestamp>.json")
    jsonl_path: str | None = Field(None, description="append one JSON line an epoch to this file")
    checkpoint_minutes: float | None = Field(
        None,
        gt=0,
        description="minutes between checkpoints within an epoch; null: at epoch ends alone",
    )
    tensorboard: bool = Field(
        False,
        description="write the same figures as scalars to <output_dir>/tensorboard/<timestamp>",
    )


def _surrogate(text: str) -> bool:
    """Whether half a character is in it: from JSON, or from an argument that is not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def auto_augment(kind: str, image_size: int) -> str:
    """What `dataset.augment: auto` stands for. kind: `dataset.type`; image_size: pixels."""
    return "none" if kind == "digits" else "pad_crop" if image_size <= 64 else "random_resized_crop"
