"""What `understudy cost` is asked: a plan's TOML file, or a run's read as one. Neither torch nor transformers is needed
to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from understudy.config import LoraConfig, RunConfig, explain
from understudy.config_base import Section, read_toml, set_dotted, toml_value
from understudy.errors import ConfigError
from understudy.flops import ModelShape
from understudy.rows import Row, read_rows

# Dense bfloat16 TFLOP/s with float32 accumulation and memory in GB, from NVIDIA's datasheets of the SXM modules (A100,
# H100, H200, HGX B200) and boards (L40S, RTX 4090 and 5090: architecture whitepapers), AMD's of the MI300X. Datasheets
# that quote "with sparsity" are halved. HGX B200 gives each GPU 180 of its 192 GB.
GPUS: Mapping[str, tuple[float, float]] = {
    "A100": (312.0, 80.0),
    "A100-40GB": (312.0, 40.0),
    "H100": (989.4, 80.0),
    "H200": (989.4, 141.0),
    "B200": (2250.0, 180.0),
    "L40S": (362.0, 48.0),
    "4090": (165.2, 24.0),
    "5090": (209.5, 32.0),
    "MI300X": (1307.4, 192.0),
}

# Where a run's prompts cannot be measured.
_PROMPT_TOKENS = 200
_CHARACTERS_PER_TOKEN = 4.0
# Where they can: as many of the first ones say enough about a mean, and a tokenizer is slow.
_MEASURED_ROWS = 1000


class ShapeConfig(Section):
    """A transformer's sizes: attention by q, k, v and o, gated MLPs, maybe experts."""

    hidden: int = Field(ge=1)
    """Width of the residual stream."""
    layers: int = Field(ge=1)
    """Number of layers."""
    heads: int = Field(ge=1)
    """Query heads."""
    kv_heads: int = Field(ge=1)
    """Key and value heads."""
    head_dim: int = Field(ge=1)
    """Width of a head."""
    intermediate: int = Field(ge=0)
    """Width of a dense layer's MLP."""
    vocab: int = Field(ge=1)
    """Rows of the embedding."""
    tied: bool = False
    """The LM head is the embedding."""
    dense_layers: int | None = Field(default=None, ge=0)
    """Layers with a dense MLP; the others have experts. Absent: all."""
    experts: int = Field(default=0, ge=0)
    """Experts in such a layer."""
    active_experts: int = Field(default=0, ge=0)
    """Experts that a token is sent to."""
    expert_intermediate: int = Field(default=0, ge=0)
    """Width of an expert."""
    shared_intermediate: int = Field(default=0, ge=0)
    """Width of the expert that every token is sent to; 0: there is none."""
    sliding_window: int = Field(default=0, ge=0)
    """Tokens that a layer with a window sees."""
    sliding_layers: int = Field(default=0, ge=0)
    """Layers with a window."""
    post_norm: bool = False
    """A norm behind the MLP, as in Gemma 2 and OLMo 2."""

    def to_shape(self) -> ModelShape:
        """As the counting functions take it."""
        return ModelShape(**self.model_dump())


class ModelPlan(Section):
    """A model by name, by its sizes, or by its number of weights alone."""

    model: str | None = None
    """Hub id or folder; the Qwen3 family's are known without a network."""
    shape: ShapeConfig | None = None
    """Sizes instead of a model: hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, ..."""
    parameters: float | None = Field(default=None, gt=0)
    """The number of weights instead of a model: then FLOPs are counted as 2N per token, and attention is left out."""

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        given = [name for name in ("model", "shape", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"one of model, shape and parameters; got {' and '.join(given) or 'none'}")
        return self


class StudentPlan(ModelPlan):
    """The model that trains."""

    lora: LoraConfig | None = None
    """Absent: full fine-tuning."""
    gradient_checkpointing: bool = False
    """Layers run twice, and keep little between."""


class MethodPlan(Section):
    """What one way of training does."""

    kind: Literal["sft", "rl", "distill"]
    """sft: the student trains on the teacher's completions; rl: on its own, graded by a program; distill: on its own,
    marked by the teacher."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(ge=1)
    """Prompts per step."""
    group_size: int = Field(default=1, ge=1)
    """Completions per prompt."""
    prompt_tokens: int = Field(ge=0)
    """Tokens of a prompt, on average; 0: they count among the completion's."""
    completion_tokens: int = Field(ge=1)
    """Tokens of a completion that trains, on average."""
    teacher_completion_tokens: int | None = Field(default=None, ge=0)
    """sft: tokens that the teacher writes for each of them, if more are written than used; 0: the rows exist. Absent:
    completion_tokens, where there is a teacher."""
    estimator: Literal["sampled", "topk", "full"] = "sampled"
    """distill: what of the teacher's distribution is used; topk and full take another pass through its LM head."""

    @property
    def sequences(self) -> int:
        """Completions in all."""
        return self.steps * self.prompts_per_step * self.group_size


class UtilisationPlan(Section):
    """Share of the peak that a role's matrix products reach. The defaults are assumptions; put your own measurements
    in their place. Sampling reads all weights for every token of a batch, and waits for memory."""

    sampling: float = Field(default=0.1, gt=0, le=1)
    """Writing completions."""
    scoring: float = Field(default=0.4, gt=0, le=1)
    """Marking them."""
    training: float = Field(default=0.35, gt=0, le=1)
    """Forward and backward passes."""


class HardwarePlan(Section):
    """What it runs on."""

    gpu: str = "H100"
    """A name from the table in docs/costs.md, or any, with tflops and memory_gb."""
    count: int = Field(default=1, ge=1)
    """GPUs at work together, as if they shared it without loss."""
    price: float | None = Field(default=None, ge=0)
    """Of a GPU hour, in any currency."""
    tflops: float | None = Field(default=None, gt=0)
    """Peak of one GPU, in dense bfloat16 TFLOP/s. Absent: the table's."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one GPU, in GB. Absent: the table's."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens in one forward-backward or scoring pass."""
    rows_at_once: int = Field(default=256, ge=1)
    """Completions written at once."""
    utilisation: UtilisationPlan = UtilisationPlan()

    @model_validator(mode="after")
    def _known_or_described(self) -> Self:
        if self.gpu not in GPUS and (self.tflops is None or self.memory_gb is None):
            raise ValueError(f"gpu {self.gpu!r} needs tflops and memory_gb; known are {', '.join(GPUS)}")
        return self

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU."""
        return 1e12 * (self.tflops or GPUS[self.gpu][0])

    @property
    def memory(self) -> float:
        """Bytes of one GPU."""
        return 1e9 * (self.memory_gb or GPUS[self.gpu][1])


class PlanConfig(Section):
    """Methods to set side by side, for one student and one teacher."""

    student: StudentPlan
    teacher: ModelPlan | None = None
    """Needed by distill, and by sft where the teacher has yet to write."""
    methods: dict[str, MethodPlan] = Field(min_length=1)
    """[methods.<name>] tables, in the order in which they are shown."""
    baseline: str | None = None
    """A method's name: the others are compared with it."""
    hardware: HardwarePlan = HardwarePlan()
    assumptions: tuple[str, ...] = ()
    """Sentences to print below the tables."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is no method; there are {', '.join(self.methods)}")
        for name, method in self.methods.items():
            if self.teacher is None and (method.kind == "distill" or method.teacher_completion_tokens):
                raise ValueError(f"methods.{name} needs a [teacher]")
        return self


def load_plan(
    path: Path,
    overrides: Mapping[str, str] = {},
    *,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
) -> PlanConfig:
    """A plan, or a run (a file with output_dir) as a plan; dotted ``overrides`` as anywhere, and for a run those of
    [hardware] too. The two lengths stand in for those of the run's rows, or of every method of a plan.

    Raises ConfigError for a missing or malformed file, unknown keys (with the nearest valid name) and wrong types.
    """
    tree, hardware = read_toml(path), {}
    is_run = "output_dir" in tree
    if "phases" in tree:
        raise ConfigError(
            f"configuration {path}",
            got="a pipeline of several phases",
            expected="one run, or a plan",
            remedy="write each phase's numbers as a [methods.<name>] of a plan: docs/costs.md",
        )
    for key, value in overrides.items():
        target = hardware if is_run and key.split(".")[0] == "hardware" else tree
        set_dotted(target, key, toml_value(value))
    if is_run:
        run = RunConfig.from_tree(tree, str(path))
        tree = tree_of_run(run, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        given = hardware.get("hardware", {})
        tree["hardware"] = tree["hardware"] | given if isinstance(given, dict) else given
    else:
        methods = tree.get("methods")
        for method in methods.values() if isinstance(methods, dict) else ():
            if isinstance(method, dict):  # what is no table is refused below
                method |= {"prompt_tokens": prompt_tokens} if prompt_tokens else {}
                method |= {"completion_tokens": completion_tokens} if completion_tokens else {}
    try:
        return PlanConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, str(path), PlanConfig) from None


def tree_of_run(run: RunConfig, *, prompt_tokens: int | None, completion_tokens: int | None) -> dict[str, Any]:
    """The tree of a plan: a run beside what else could be done with its prompts, by the same number of completions of
    the same lengths."""
    teacher = next(iter(run.all_teachers.values()), None)
    supervised = teacher is None and run.reward is None
    prompt, written, said = _lengths(run, supervised)
    if prompt_tokens is None:
        prompt_tokens = prompt
    else:
        said = []
    if completion_tokens is None:
        completion_tokens = written or run.training_sampling.max_completion_tokens
        said.append(
            f"completions of {completion_tokens} tokens: the rows' mean"
            if written
            else f"completions of {completion_tokens} tokens, the cap: an upper bound; --completion-tokens says better"
        )
    sampling = run.sampling
    common = {
        "steps": run.optim.num_steps,
        "prompts_per_step": run.supervised.batch_size if supervised else sampling.groups_per_batch,
        "group_size": 1 if supervised else sampling.group_size,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }
    estimator = run.objective.estimator
    methods: dict[str, Any] = {}
    if teacher is not None:
        methods["distill"] = common | {"kind": "distill", "estimator": "full" if estimator == "auto" else estimator}
    if not supervised:
        methods["rl"] = common | {"kind": "rl"}
    if supervised or teacher is not None:
        methods["sft"] = common | {"kind": "sft"}
    if len(run.all_teachers) > 1:
        said.append(f"every prompt marked by {teacher.model if teacher else ''}, the first of several teachers")
    if run.reference is not None:
        said.append("[reference] and its marks are left out")
    said.append("evaluations are left out")
    student: dict[str, Any] = {
        "model": run.student.model,
        "gradient_checkpointing": run.student.gradient_checkpointing,
    }
    if run.student.lora is not None:
        student["lora"] = run.student.lora.model_dump()
    hardware: dict[str, Any] = {"rows_at_once": sampling.max_batch_rows}
    if run.optim.micro_batch_tokens is not None:
        hardware["micro_batch_tokens"] = run.optim.micro_batch_tokens
    return {
        "student": student,
        "teacher": {"model": teacher.model} if teacher is not None else None,
        "methods": methods,
        "hardware": hardware,
        "assumptions": said,
    }


def _lengths(run: RunConfig, supervised: bool) -> tuple[int, int | None, list[str]]:
    """(tokens of a prompt, tokens of a completion that the rows bring, how these were found): means over the rows,
    where they are a file at hand."""
    path = Path(run.prompts.path) if run.prompts else None
    if run.prompts is None or path is None or not path.is_file():
        what = f"{path} is no file here" if path else "there is no [prompts]"
        said = f"prompts of {_PROMPT_TOKENS} tokens, because {what}; --prompt-tokens says better"
        return _PROMPT_TOKENS, None, [said]
    count, how = _token_counter(run.student.model)
    pairs = [_texts(row, supervised) for row in read_rows(run.prompts)[:_MEASURED_ROWS]]
    prompt = max(1, round(fmean(count(text) for text, _ in pairs)))
    completion = round(fmean(count(text) for _, text in pairs)) if supervised else 0
    said = (
        f"prompts of {prompt} tokens: the mean of {path} ({len(pairs)} rows), {how}, without what a chat template adds"
    )
    return prompt, max(1, completion) if supervised else None, [said]


def _texts(row: Row, supervised: bool) -> tuple[str, str]:
    """A row's (prompt, completion); "" where it has none."""
    messages = [message["content"] for message in row.messages() or []]
    completion = row.text("completion") or row.text("text") or ""
    if supervised and messages and not completion:
        completion = messages.pop()
    return "\n".join([row.text("prompt") or "", *messages]), completion


def _token_counter(model: str) -> tuple[Callable[[str], float], str]:
    """Text -> tokens, by the model's own tokenizer where that is a folder; and a phrase that says so."""
    if not Path(model).is_dir():
        return lambda text: len(text) / _CHARACTERS_PER_TOKEN, f"at {_CHARACTERS_PER_TOKEN:.0f} characters a token"
    from understudy.tokenization import load_text

    tokenizer = load_text(model, "student").tokenizer
    return lambda text: len(tokenizer(text)["input_ids"]), "by the student's tokenizer"
