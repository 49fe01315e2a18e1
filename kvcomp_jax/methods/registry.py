"""The table of methods, and their textual form: `name:option=value,option=value+name`."""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from kvcomp_jax.calibrate import Calibrate, NotCalibrated
from kvcomp_jax.plan import CachePlan, Layout, clip, localise
from kvcomp_jax.spec import LayerSpec, room

Axis = Literal["none", "quantise", "select"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may size its spec by.

    Attributes:
      layout: The model.
      max_len: Tokens that a row may reach, prompt and continuation.
      prompt_len: Tokens of the prompt, for budgets that are a fraction of it; None if unknown.
      longest: Tokens of the longest prompt of the batch, for budgets in tokens: their shares of layers are the same in
        all rows; None if unknown.
      least: Tokens of a layer's budget, sinks and window aside, that a selecting method needs at least: 1, or where a
        quantising one stores them, a block and what waits for the next.
    """

    layout: Layout
    max_len: int
    prompt_len: int | None = None
    longest: int | None = None
    least: int = 1

    def tokens(self, budget: int | float) -> int:
        """Resolve a budget: an int is tokens, a float a fraction of the prompt."""
        if isinstance(budget, int):
            if budget < 1:
                raise ValueError(f"budget={budget} must be at least 1 token.")
            return budget
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget} is a fraction and must be in (0, 1]; write an integer for tokens.")
        if self.prompt_len is None:
            raise ValueError(f"budget={budget} is a fraction of the prompt: pass prompt_len, or write it in tokens.")
        return max(int(budget * self.prompt_len), 1)

    @property
    def later(self) -> int:
        """Tokens that may follow the longest prompt, or all if its length is unknown."""
        return max(self.max_len - (self.prompt_len or 0), 0)


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One row of the table `METHODS`.

    Attributes:
      name, axis, source: What it is called, what it does to tokens, and who published it.
      bits: Of a stored value, without metadata; for people.
      summary: One sentence.
      build: Returns the spec, or one a layer.
      advice: When to take it, one sentence.
      settings: Options of the settings that its source reports, as on a command line; "" is the defaults.
      calibrate: What makes the file it needs, see `Calibrate`; None needs none.
    """

    name: str
    axis: Axis
    bits: str
    source: str
    summary: str
    build: Callable[..., LayerSpec | tuple[LayerSpec, ...]]
    advice: str = ""
    settings: tuple[str, ...] = ("",)
    calibrate: Calibrate | None = None

    @property
    def calibration(self) -> bool:
        """Whether it needs to be calibrated for a model."""
        return self.calibrate is not None

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Options by name, with annotation and default."""
        return {p.name: p for p in inspect.signature(self.build).parameters.values() if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, MethodInfo] = {}


def method(
    *,
    axis: Axis,
    bits: str,
    source: str,
    advice: str = "",
    settings: tuple[str, ...] = ("",),
    calibrate: Calibrate | None = None,
) -> Callable:
    """Register a function `(context, *, options) -> LayerSpec` under its own name; see `MethodInfo`.

    It may return one spec for all layers, or a tuple with one for each. `calibrate` makes what it needs to know of a
    layer, see `Calibrate`.
    """

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        name = build.__name__
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already.")
        summary = (inspect.getdoc(build) or "").partition("\n")[0]
        METHODS[name] = MethodInfo(name, axis, bits, source, summary, build, advice, settings, calibrate)
        return build

    return register


@dataclasses.dataclass(frozen=True)
class Method:
    """A method with its options, or a selecting and a quantising one composed; hashable."""

    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    def __str__(self) -> str:
        return "+".join(
            name + (":" + ",".join(f"{k}={v}" for k, v in options) if options else "") for name, options in self.parts
        )

    @property
    def name(self) -> str:
        """Names of the parts, joined by +."""
        return "+".join(name for name, _ in self.parts)

    def spec(self, *, max_len: int, head_dim: int, prompt_len: int | None = None, num_kv_heads: int = 1) -> LayerSpec:
        """Return the spec of a single layer without sliding window."""
        layout = Layout(num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim)
        return self.plan(layout, max_len=max_len, prompt_len=prompt_len).specs[0]

    def plan(
        self, layout: Layout, *, max_len: int, prompt_len: int | None = None, longest: int | None = None
    ) -> CachePlan:
        """Return the specs of all layers.

        Args:
          layout: The model's sizes.
          max_len: Tokens that a row may reach.
          prompt_len: Tokens of the longest prompt, for fractional budgets.
          longest: Where the plan is a single row's, tokens of the longest prompt of its batch; None: `prompt_len`.

        Raises:
          NotCalibrated: If it needs a calibration that is not there.
          ValueError: If an option's value is impossible, alone or for this model; the method is named.
        """
        if max_len < 1:
            raise ValueError(f"max_len={max_len} must be at least 1 token.")
        context = Context(layout, max_len, prompt_len, longest or prompt_len)
        try:
            every = self._build(context)
            fit = functools.cache(functools.partial(self._fit, context))  # layers are often alike
            windows = layout.sliding_windows or (None,) * layout.num_layers
            by_layer = zip(zip(*every, strict=True), windows, strict=True)
            specs = tuple(fit(parts, window) for parts, window in by_layer)
        except ValueError as error:
            kind = NotCalibrated if isinstance(error, NotCalibrated) else ValueError
            raise kind(f"{self}: {error}") from error
        return CachePlan(specs, layout, planner=self, max_len=max_len, longest=context.longest)

    def _build(self, context: Context) -> list[tuple[LayerSpec, ...]]:
        """Each part's specs of all layers; a selecting part is built last, since it may size budgets by blocks."""
        built: dict[str, tuple[LayerSpec, ...]] = {}
        for name, options in sorted(self.parts, key=lambda part: METHODS[part[0]].axis != "quantise"):
            spec = METHODS[name].build(context, **dict(options))
            built[name] = (spec,) * context.layout.num_layers if isinstance(spec, LayerSpec) else spec
            blocks = [_block(layer) for layer in built[name] if METHODS[name].axis == "quantise"]
            context = dataclasses.replace(context, least=2 * max(blocks, default=1) - 1)
        return [built[name] for name, _ in self.parts]

    def _fit(self, context: Context, parts: tuple[LayerSpec, ...], window: int | None) -> LayerSpec:
        """The spec of one layer, whose queries see `window` tokens, from those of the method's parts."""
        layout, max_len = context.layout, context.max_len
        spec = clip(parts[0] if len(parts) == 1 else _compose(self, list(parts), max_len), max_len)
        spec.check(layout.head_dim)
        return spec if window is None else localise(spec, window, max_len, layout.head_dim, layout.num_kv_heads)


def parse(text: str) -> Method:
    """Read `"kivi:bits=2,group_size=32"`, or a composition such as `"h2o:budget=0.5+int4"`.

    Raises:
      ValueError: One line that names what is unknown or malformed and the nearest thing that exists.
    """
    parts = tuple(_parse_part(part.strip()) for part in text.split("+"))
    axes = sorted(METHODS[name].axis for name, _ in parts)
    if len(parts) > 1 and axes != ["quantise", "select"]:
        raise ValueError(f"{text!r}: a composition is a selecting and a quantising method, not {' and '.join(axes)}.")
    return Method(parts)


def _parse_part(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    name, _, tail = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{_nearest(name, METHODS)}.")
    known = METHODS[name].options
    options: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in tail.split(","))):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{_nearest(key, known)}.")
        if not equals or not value:
            raise ValueError(f"{name}: option {key!r} needs a value, as in {key}={known[key].default}.")
        if key in options:
            raise ValueError(f"{name}: option {key!r} is given twice.")
        options[key] = _convert(name, key, value, known[key].annotation)
    return name, tuple(options.items())


def _convert(name: str, key: str, text: str, annotation: Any) -> Any:
    """Read a value as one of the annotated types."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if types.NoneType in kinds and text.lower() == "none":
        return None
    for kind in (int, float, str):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = " or ".join(k.__name__ for k in kinds if k is not types.NoneType)
    raise ValueError(f"{name}: {key}={text!r} must be {wanted}.")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    listed = "; known: " + ", ".join(sorted(known)) if known else "; it has none"
    return f", did you mean {close[0]!r}?{listed}" if close else listed


def _compose(whole: Method, specs: list[LayerSpec], max_len: int) -> LayerSpec:
    """Keep the tokens that one spec selects in the codecs of the other's last rung, within the same budget."""
    select, store = specs if METHODS[whole.parts[0][0]].axis == "select" else reversed(specs)
    if store.divided:
        raise ValueError(
            "the quantising method ranks tokens itself, to store them in several widths, and cannot have another rank "
            "them; compose one that stores all alike, e.g. int4 or kivi."
        )
    if select.evicts_nothing(max_len):
        return _look_up(select, store, max_len)
    final, block = store.rungs[-1], _block(store)
    window = select.window if select.rungs else store.window
    sinks = max(select.policy.num_sinks, store.policy.num_sinks)
    later = sum(rung.reserve for rung in select.rungs)
    budget, later = select.max_tokens - later, math.ceil(later / select.keep)  # blocks of codes are not thinned
    capacity = (budget - sinks - window - (block - 1)) // block * block
    if capacity < block:
        needed = sinks + window + 2 * block - 1
        raise ValueError(
            f"budget={budget} tokens of a layer is too small: {sinks} sinks, {window} exact ones, a block of {block} "
            f"and what waits for the next need {needed}; take a larger budget or a smaller window."
        )
    policy = dataclasses.replace(select.policy, num_sinks=sinks)
    reserve = -(-later // block) * block
    rung = dataclasses.replace(final, capacity=capacity + reserve, reserve=reserve, heads=select.heads)
    kept = {"drop": select.drop, "close_gap": select.close_gap}
    return LayerSpec(rungs=(rung,), policy=policy, window=window, block_size=block, **kept)


def _block(store: LayerSpec) -> int:
    """Tokens of a composition that settle together: at least 16, whole units of the codecs."""
    unit = store.rungs[-1].unit if store.rungs else 1
    return -(-16 // unit) * unit


def _look_up(select: LayerSpec, store: LayerSpec, max_len: int) -> LayerSpec:
    """Keep all tokens in the codecs of `store`, and read of them what `select` looks up.

    Pages grow to whole units of the codecs, blocks to whole pages, and what waits for its block counts in the budget,
    of which a page is the least. A layer that reads all is that of `store`.
    """
    lookup, final = select.rungs[-1].lookup, store.rungs[-1]
    if lookup is None:
        return store
    index = lookup.index.paged(final.unit)
    block = -(-select.block_size // index.page_size) * index.page_size
    tokens = max(lookup.tokens - (block - select.block_size), index.page_size)
    lookup = dataclasses.replace(lookup, index=index, tokens=tokens)
    sinks = max(select.policy.num_sinks, store.policy.num_sinks)
    rung = dataclasses.replace(final, capacity=room(max_len, block), reserve=0, lookup=lookup)
    policy = dataclasses.replace(select.policy, num_sinks=sinks)
    return LayerSpec(rungs=(rung,), policy=policy, window=max(select.window, store.window), block_size=block)
