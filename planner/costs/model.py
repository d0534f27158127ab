"""`CostModel`: prices from measurements where there are any, learned from near ones where there are not, else modelled.

An op at local shapes is looked up in the store; if the device is here it is measured, within a budget of seconds per
plan. Otherwise its modelled time is multiplied by the ratio of measured to modelled time of the nearest sample of the
same op ("interpolated" within a factor `_NEAR` of its size, "modelled" beyond).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from shardplan.planner.cluster import Cluster, DeviceKind
from shardplan.planner.costs import calibration, mixtures, profile, saves, shipped
from shardplan.planner.costs.base import OpCost, OpSaves, Overheads, coverage_of
from shardplan.planner.costs.calibration import Corrections
from shardplan.planner.costs.company import Company
from shardplan.planner.costs.links import LinkModel
from shardplan.planner.costs.roofline import copy_seconds, modelled_seconds, optimizer_seconds
from shardplan.planner.costs.store import Sample, Store
from shardplan.planner.costs.tables import interpolate
from shardplan.planner.rules.localize import LocalCall

_NEAR = 4.0
_COPY_SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24)
_OPTIMIZER_SIZES = (1 << 10, 1 << 22)
_PASSES = (1.0, 3.0, 10.0)
"""A forward, a backward and the rest of a step, in units of starting autograd."""
_BUDGET_SECONDS = 40.0
_RUNS = 6  # of an op that takes long, when it is measured
_LARGEST_NBYTES = 1 << 30


class CostModel:
    """Implements `planner.costs.base.Costs`.

    links: what moving bytes costs. store: where measurements are looked up and kept (None: only for this object).
    measure: whether devices that are here may be measured. progress: gets a line now and then. budget_seconds: about
    how long measuring may take in all. profile_seconds: how long it did. model: fingerprint of the trace that is
    planned, so that corrections from its own measured jobs come first. optimizer: makes the one that will run (None:
    none will).
    """

    def __init__(
        self,
        cluster: Cluster,
        links: LinkModel,
        store: Store | None = None,
        measure: bool = True,
        progress: Callable[[str], None] | None = None,
        budget_seconds: float = _BUDGET_SECONDS,
        model: str = "",
        optimizer: Callable[..., torch.optim.Optimizer] | None = torch.optim.AdamW,
    ) -> None:
        self.cluster = cluster
        self.links = links
        self.store = store if store is not None else Store(":memory:")
        self.profile_seconds = 0.0
        self._progress = progress
        self._model = model
        self._optimizer = optimizer
        self._corrections: dict[str, Corrections] = {}
        self._budget_seconds = budget_seconds
        # One representative per kind: the first device that is here.
        self._local = {d.kind: d.local for d in reversed(cluster.devices) if d.local} if measure else {}
        self._keys = {kind: profile.device_key(torch.device(local)) for kind, local in self._local.items()}
        self._ops: dict[tuple[str, str], OpCost] = {}
        self._families: dict[str, list[Sample]] = {}
        self._ratios: dict[tuple[str, str], list[float]] = {}
        self._saves: dict[str, OpSaves] = {}
        self._copies: dict[str, tuple[tuple[int, float], ...]] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._shipped: dict[str, dict[str, Sample]] = {}
        self._companies: dict[str, Company] = {}
        self._measured = 0

    # -- ops -----------------------------------------------------------------------------------------------------------

    def op(self, call: LocalCall, device: int) -> OpCost:
        """See `Costs.op`."""
        kind = self.cluster.devices[device].kind
        key = (kind.name, profile.timed_key(call) if kind in self._keys else profile.call_key(call))
        found = self._ops.get(key)
        if found is None and mixtures.is_mixture(call):
            found = self._ops[key] = self._together([self.op(part, device) for part in mixtures.parts(call)])
        if found is None:
            plain = self._op(call, device, key[1])
            ahead, back = self._corrections_on(kind).of(str(call.target))
            found = self._ops[key] = replace(
                plain,
                forward_seconds=plain.forward_seconds * ahead,
                backward_seconds=plain.backward_seconds * back,
            )
        return found

    def _together(self, costs: Sequence[OpCost]) -> OpCost:
        """One after the other; the source is that of most of the seconds."""
        shares = coverage_of(costs)
        return OpCost(
            sum(cost.forward_seconds for cost in costs),
            sum(cost.backward_seconds for cost in costs),
            max(shares, key=lambda source: shares[source], default="modelled"),
        )

    def _corrections_on(self, kind: DeviceKind) -> Corrections:
        """What measured jobs say of a kind of device."""
        if kind.name not in self._corrections:
            place = self._keys.get(kind)
            known = calibration.load(self.store, place) if place is not None else []
            self._corrections[kind.name] = calibration.corrections(known, self._model)
        return self._corrections[kind.name]

    def overheads(self, device: int) -> Overheads:
        """See `Costs.overheads`. Until a job was measured: multiples of what starting autograd takes. Devices that are
        only described have none."""
        kind = self.cluster.devices[device].kind
        if kind not in self._local:
            return Overheads()
        known, unit = self._corrections_on(kind), self.company(self._local[kind]).pass_seconds
        measured = (known.forward_seconds, known.backward_seconds, known.step_seconds)
        ahead, back, step = (times * unit if s is None else s for s, times in zip(measured, _PASSES, strict=True))
        return Overheads(ahead, back, step, known.reduce, known.collective, known.memory, known.factors(), known.jobs)

    def _op(self, call: LocalCall, device: int, call_key: str) -> OpCost:
        kind = self.cluster.devices[device].kind
        modelled = modelled_seconds(call, kind)
        place = self._keys.get(kind)
        if place is None:
            return self._described(call, call_key, kind, modelled)
        key, family = f"op/{place}/{call_key}", f"op/{place}/{profile.family_key(call)}"
        sample = self.store.sample(key)
        if sample is None and self._worth_measuring(call, modelled):
            sample = self._measure(call, self._local[kind], key, family, modelled)
        if sample is not None:
            self._learn(place, str(call.target), sample)
            return _cost_of(sample)
        return self._learned(place, str(call.target), family, modelled)

    def _described(self, call: LocalCall, call_key: str, kind: DeviceKind, modelled: tuple[float, float]) -> OpCost:
        """A device that is not here: by what was measured on one of its kind, if the package has that."""
        place = f"shipped/{kind.name}"
        if kind.name not in self._shipped:
            self._shipped[kind.name] = {sample.key: sample for sample in shipped.samples(kind.name)}
            for sample in self._shipped[kind.name].values():
                self._families.setdefault(f"{place}/{sample.family}", []).append(sample)
                self._learn(place, sample.family.partition("|")[0], sample)
        known = self._shipped[kind.name].get(call_key)
        if known is not None:
            return _cost_of(known)
        return self._learned(place, str(call.target), f"{place}/{profile.family_key(call)}", modelled)

    def _learn(self, place: str, target: str, sample: Sample) -> None:
        whole = sample.modelled_forward_seconds + sample.modelled_backward_seconds
        if whole > 0:
            ratio = (sample.forward_seconds + sample.backward_seconds) / whole
            for name in (target, ""):
                self._ratios.setdefault((place, name), []).append(ratio)

    def _worth_measuring(self, call: LocalCall, modelled: tuple[float, float]) -> bool:
        nbytes = sum(value.nbytes for value in (*call.inputs, *call.outputs))
        left = self._budget_seconds - self.profile_seconds
        return left > 0 and nbytes <= _LARGEST_NBYTES and _RUNS * sum(modelled) <= left

    def _measure(
        self, call: LocalCall, local: str, key: str, family: str, modelled: tuple[float, float]
    ) -> Sample | None:
        started = time.perf_counter()
        taken = profile.measure(call, torch.device(local), self.company(local))
        self.profile_seconds += time.perf_counter() - started
        self._measured += 1
        if self._progress is not None and self._measured % 50 == 0:
            self._progress(f"measured {self._measured} ops in {self.profile_seconds:.1f} s")
        if taken is None:
            return None
        sample = profile.sample_of(taken, key, family, modelled)
        self.store.put_samples([sample])
        self._families.setdefault(family, self.store.family(family))
        if all(known.key != key for known in self._families[family]):
            self._families[family].append(sample)
        return sample

    def company(self, local: str) -> Company:
        """What ops in company take longer on a device of this machine."""
        if local not in self._companies:
            key = f"company/{profile.device_key(torch.device(local))}"
            text = self.store.get_text(key)
            found = Company.parse(text) if text is not None else None
            if found is None:
                found = profile.measure_device(torch.device(local))
                self.store.put_text(key, found.to_json())
            self._companies[local] = found
        return self._companies[local]

    def _learned(self, place: str, target: str, family: str, modelled: tuple[float, float]) -> OpCost:
        """Scale the model as the nearest sample of the same op says; without one as the op's other uses or, last, all
        ops on the device do, so that modelled and measured prices can be compared."""
        samples = self._families.get(family)
        if samples is None:
            samples = self._families[family] = self.store.family(family)
        if not samples:
            ratios = self._ratios.get((place, target)) or self._ratios.get((place, "")) or [1.0]
            scale = statistics.median(ratios)
            return OpCost(modelled[0] * scale, modelled[1] * scale)

        def distance(sample: Sample) -> float:
            return abs(math.log(max(sample.modelled_forward_seconds, 1e-9) / max(modelled[0], 1e-9)))

        nearest = min(samples, key=lambda sample: (distance(sample), sample.key))
        forward = modelled[0] * nearest.forward_seconds / max(nearest.modelled_forward_seconds, 1e-9)
        backward = modelled[1] * (
            nearest.backward_seconds / nearest.modelled_backward_seconds if nearest.modelled_backward_seconds else 1.0
        )
        grown = modelled[0] / max(nearest.modelled_forward_seconds, 1e-9)
        return OpCost(
            forward,
            backward,
            "interpolated" if distance(nearest) <= math.log(_NEAR) else "modelled",
            nearest.forward_scratch * grown,
            nearest.backward_scratch * grown,
        )

    def coverage(self) -> dict[str, float]:
        """Share of the seconds of all different ops asked for by source: "measured", "interpolated", "modelled"."""
        return coverage_of(self._ops.values())

    def warm(self, calls: Iterable[LocalCall], device: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Price many calls at once, the longest first, so that the budget goes where it matters. progress: gets how
        many are done of how many."""
        kind = self.cluster.devices[device].kind
        different = {profile.call_key(call): call for call in calls}
        ordered = sorted(different.items(), key=lambda item: (-sum(modelled_seconds(item[1], kind)), item[0]))
        for done, (_, call) in enumerate(ordered, 1):
            self.op(call, device)
            if progress is not None:
                progress(done, len(ordered))

    def saves(self, node: fx.Node) -> OpSaves:
        """See `Costs.saves`."""
        key = saves.key_of(node)
        found = self._saves.get(key)
        if found is None:
            found = self._saves[key] = saves.observe(node, self.cluster.devices[0].kind.torch_device)
        return found

    # -- moving bytes --------------------------------------------------------------------------------------------------

    def collective(self, kind: str, nbytes: int, ranks: tuple[int, ...]) -> float:
        """See `Costs.collective`."""
        return self.links.collective(kind, nbytes, ranks)

    def p2p(self, nbytes: int, source: int, target: int) -> float:
        """See `Costs.p2p`."""
        factor = self._corrections_on(self.cluster.devices[source].kind).message
        return self.links.p2p(nbytes, source, target) * factor

    def slowdown(self, kind: str, ranks: tuple[int, ...]) -> tuple[float, float]:
        """See `Costs.slowdown`."""
        return self.links.slowdown(kind, ranks)

    def copy(self, nbytes: int, device: int) -> float:
        """See `Costs.copy`."""
        kind = self.cluster.devices[device].kind
        place = self._keys.get(kind)
        if place is None:
            return copy_seconds(nbytes, kind)
        if place not in self._copies:
            local = torch.device(self._local[kind])
            self._copies[place] = tuple(
                (size, self._number(f"copy/{place}/{size}", lambda s=size: profile.measure_copy(s, local)))
                for size in _COPY_SIZES
            )
        return interpolate(self._copies[place], nbytes)

    def optimizer(self, nbytes: int, device: int) -> float:
        """See `Costs.optimizer`."""
        kind = self.cluster.devices[device].kind
        if self._optimizer is None:
            return 0.0
        place = self._keys.get(kind)
        if place is None:
            return optimizer_seconds(nbytes, kind)
        if place not in self._rates:
            local, make = torch.device(self._local[kind]), self._optimizer
            name = profile.optimizer_key(make)
            small, large = (
                self._number(
                    f"optimizer/{place}/{name}/{size}", lambda s=size: profile.measure_optimizer(make, s, local)
                )
                for size in _OPTIMIZER_SIZES
            )
            rate = max(large - small, 0.0) / (_OPTIMIZER_SIZES[1] - _OPTIMIZER_SIZES[0])
            self._rates[place] = max(small - rate * _OPTIMIZER_SIZES[0], 0.0), rate
        each, rate = self._rates[place]
        return (each + nbytes * rate) * self._corrections_on(kind).optimizer

    def _number(self, key: str, measure: Callable[[], float]) -> float:
        sample = self.store.sample(key)
        if sample is None:
            started = time.perf_counter()
            sample = Sample(key, "", measure(), 0.0, 0.0, 0.0)
            self.profile_seconds += time.perf_counter() - started
            self.store.put_samples([sample])
        return sample.forward_seconds


def _cost_of(sample: Sample) -> OpCost:
    return OpCost(
        sample.forward_seconds,
        sample.backward_seconds,
        "measured",
        float(sample.forward_scratch),
        float(sample.backward_scratch),
    )
