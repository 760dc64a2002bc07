"""Every option of `loftq quantize`, in one frozen model: defaults < `--config FILE.yaml` < flags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from loftq_cli.errors import ConfigError, did_you_mean

Bits = Literal[2, 3, 4, 8]
CALIBRATED = ("qera", "cloq", "apiq-lw", "apiq-bw")  # methods that see text
UNCALIBRATED = ("loftq", "qlora")
TRAINED = ("apiq-lw", "apiq-bw")
EPOCHS = {"qlora": 20}  # of training, as published; from a better start fewer do
FEWER_EPOCHS = 5
GRIDS = ("uniform", "uniform-symmetric")  # quantizers to integers; all others have a codebook


def parse_bits_for(value: Any) -> Any:
    """`GLOB=BITS`, or several of them, as a mapping; anything else as it is.

    Raises:
        ValueError: a string is not of this form.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    rules: dict[str, Any] = {}
    for entry in value:
        glob, equals, bits = str(entry).rpartition("=")
        if not equals or not bits.isdigit():
            raise ValueError(f"`{entry}` is not GLOB=BITS, e.g. `*.down_proj=4`")
        rules[glob] = int(bits)
    return rules


class QuantizeConfig(BaseModel):
    """What decides the bytes that come out, and on which device they are computed.

    `None` in `quantizer`, `alpha` and `format="auto"` stand for a default that depends on other options or on the
    model; `loftq_cli.plan.make_plan` returns the configuration with all of them decided.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits = 4
    quantizer: Literal["uniform", "uniform-symmetric", "nf", "nf-search", "lloyd", "lloyd-fit"] | None = None
    group_size: int = 64
    format: Literal["auto", "bnb", "gptq", "compressed-tensors", "packed", "dense"] = "auto"
    double_quant: bool = False
    skip: Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)] = ()
    bits_for: Annotated[dict[str, Bits], BeforeValidator(parse_bits_for)] = Field(default_factory=dict)

    method: Literal["loftq", "qlora", "qera", "cloq", "apiq-lw", "apiq-bw"] = "loftq"
    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    rslora: bool = False
    iters: int = Field(default=5, ge=1)
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    experts_adapter: bool = False
    quantize_head: bool = False
    quantize_embeddings: bool = False

    calibration: str | None = None
    samples: int = Field(default=128, ge=1)
    seqlen: int | None = Field(default=None, ge=2)
    init: Literal["cloq", "qera", "loftq", "qlora"] | None = None
    epochs: int | None = Field(default=None, ge=1)
    factor_lr: float = Field(default=5e-4, gt=0)
    clip_lr: float = Field(default=5e-3, gt=0)
    code_lr: float = Field(default=2e-3, ge=0)
    augmented: bool = False
    finish_epochs: int = Field(default=0, ge=0)
    finish_lr: float = Field(default=5e-4, gt=0)
    activation_budget: float | None = Field(default=None, ge=0, exclude=True)  # decides no byte, so nobody records it

    revision: str | None = None
    trust_remote_code: bool = False
    evict: bool = Field(default=False, exclude=True)  # neither does this

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    seed: int = 0

    @model_validator(mode="after")
    def _fits_itself(self) -> QuantizeConfig:
        if self.group_size != -1 and not 8 <= self.group_size <= 65536:
            raise ValueError(f"`group_size` {self.group_size} is out of range: use -1 (a whole row) or 8 .. 65536")
        widths = {self.bits, *self.bits_for.values()}
        if self.quantizer not in (None, *GRIDS) and widths == {8}:
            raise ValueError(f"`quantizer` {self.quantizer} has 2, 3 or 4 bits; use `uniform` for 8")
        if self.double_quant and 8 in widths:
            raise ValueError("`double_quant` quantizes the scales of codebooks, and 8 bits have none: leave one out")
        if self.quantizer == "nf" and self.group_size == -1:
            raise ValueError("`quantizer` nf needs a block length in `group_size` (64 as published), not -1")
        self._refuse_idle(("calibration", "samples", "seqlen", "finish_epochs", "finish_lr"), CALIBRATED)
        self._refuse_idle(("init", "epochs", "factor_lr", "clip_lr"), TRAINED)
        self._refuse_idle(("augmented", "code_lr"), ("apiq-bw",))
        self._refuse_idle(("evict",), UNCALIBRATED)  # the others read a checkpoint several times
        # and begin behind the embeddings, with the source's, and stop at the last block
        self._refuse_idle(("quantize_head", "quantize_embeddings"), UNCALIBRATED)
        if self.finish_epochs == 0 and self._was_given("finish_lr"):
            raise ValueError("`finish_lr` is that of a finish: give `finish_epochs`, too")
        start = (self.init or "cloq") if self.is_trained else self.method
        if self.method in CALIBRATED and start in ("qera", "qlora") and self._was_given("iters"):
            raise ValueError(f"`{start}` does not alternate: it makes nothing of `iters`")
        if self.init == "qlora" and self._was_given("code_lr"):
            raise ValueError("from `init` qlora it is clipping that trains, and decides the codes: leave out `code_lr`")
        if self.double_quant and (quantizer := self.default_quantizer()) in GRIDS:
            if self.format in ("gptq", "compressed-tensors"):
                raise ValueError(f"`format` {self.format} has no 8-bit scales: with `double_quant` use `format` packed")
            raise ValueError(
                f"`double_quant` quantizes the scales of a codebook, not those of `{quantizer}`: use the quantizer "
                "`lloyd` or, at 4 bits, `nf`"
            )
        return self

    def _refuse_idle(self, names: Iterable[str], methods: tuple[str, ...]) -> None:
        """Refuse options that were given for other methods than this one."""
        for name in names:
            if self.method not in methods and self._was_given(name):
                raise ValueError(f"`{name}` is for `method` {', '.join(methods)}; `{self.method}` makes nothing of it")

    def _was_given(self, name: str) -> bool:
        return bool(getattr(self, name) != QuantizeConfig.model_fields[name].default)

    @property
    def is_trained(self) -> bool:
        """Whether the method trains what a closed form begins."""
        return self.method in TRAINED

    def decided(self) -> QuantizeConfig:
        """The same with the defaults that depend on other options; only a plan can choose the format."""
        update: dict[str, Any] = {"quantizer": self.default_quantizer(), "alpha": self.alpha or float(self.rank)}
        if self.is_trained:
            init = self.init or "cloq"
            update |= {"init": init, "epochs": self.epochs or EPOCHS.get(init, FEWER_EPOCHS)}
        return self.model_copy(update=update)

    def default_quantizer(self) -> str:
        """The quantizer asked for, else what suits the format: `nf` or `uniform` where any would do.

        Of a codebook, it is that of what has less than 8 bits.
        """
        if self.quantizer is not None:
            return self.quantizer
        if self.format == "compressed-tensors":
            return "uniform-symmetric"
        widths = {self.bits, *self.bits_for.values()}
        if self.format == "bnb" and widths == {4}:
            return "nf"
        if self.format == "packed" or (self.format == "auto" and self.double_quant and widths != {4}):
            return "uniform" if widths == {8} else "lloyd"
        if self.method == "cloq" or self.is_trained:
            return "uniform"
        takes_nf = widths == {4} if self.format == "auto" else self.format == "dense" and widths - {8} == {4}
        return "nf" if takes_nf else "uniform"


def load_config(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> QuantizeConfig:
    """Merge a YAML file and command-line flags (those that are not None) over the defaults.

    Raises:
        ConfigError: unreadable YAML, an unknown key (with the nearest known one), or a value out of range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_yaml(file))
    values.update({name: value for name, value in (flags or {}).items() if value is not None})
    return build_config(values, where=f" in `{file}`" if file else "")


def build_config(values: Mapping[str, Any], where: str = "") -> QuantizeConfig:
    """Validate `values`; the first problem becomes a `ConfigError` that names the flag.

    Raises:
        ConfigError: see `load_config`.
    """
    for key in values:
        if key not in QuantizeConfig.model_fields:
            raise ConfigError(f"unknown option `{key}`{where}", did_you_mean(str(key), QuantizeConfig.model_fields))
    try:
        return QuantizeConfig(**values)
    except ValidationError as error:
        raise _explain(error, where) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text)
    except OSError as error:
        raise ConfigError(f"cannot read `--config` file `{file}`: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"`{file}` is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or node is None:
        raise ConfigError(f"`{file}` must hold `option: value` lines, not a {type(values).__name__}")
    for name, count in Counter(key.value.replace("-", "_") for key, _ in node.value).items():
        if count > 1:  # of which YAML takes the last
            raise ConfigError(f"`{file}` has `{name}` {count} times", "leave one")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _explain(error: ValidationError, where: str) -> ConfigError:
    problem = error.errors()[0]
    value = problem.get("input")
    if not problem["loc"]:  # raised by the model's own validator: the sentence is ours
        message = problem["msg"].removeprefix("Value error, ")
        for field in QuantizeConfig.model_fields:
            message = message.replace(f"`{field}`", f"`--{field.replace('_', '-')}`")
        return ConfigError(message)
    flag = "--" + str(problem["loc"][0]).replace("_", "-")
    if flag == "--bits-for" and len(problem["loc"]) > 1:
        value = f"{problem['loc'][1]}={value}"
    if problem["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
        return ConfigError(f"`{flag} {value}`{where} is not one of its values", did_you_mean(str(value), choices))
    if flag == "--device":
        return ConfigError(f"`--device {value}`{where} is not a device", "use auto, cpu, cuda or cuda:N")
    if problem["type"] == "value_error":  # a sentence of ours
        return ConfigError(f"`{flag}`{where}: {problem['msg'].removeprefix('Value error, ')}")
    return ConfigError(f"`{flag} {value}`{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
