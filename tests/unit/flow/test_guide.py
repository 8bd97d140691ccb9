"""Guidance by hand: each affine map, the rows it leaves alone, and the passes it does not make.

That guidance of a fraction of the rows is right on average is shown in tests/theory/test_unbiased.py.
"""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.flow import dropout
from dumo.flow.draw import draw
from dumo.flow.guide import PRESETS, Guide, Interval
from dumo.flow.path import Linear
from dumo.objectives import DuMo, FlowMatching
from dumo.types import Cond, Noised, UserError

V_C, V_NULL = 3.0, 5.0


def record() -> Noised:
    """Six rows; the second and the fifth have lost their label; times 0, .2, .4, .6, .8, 1; v_t = 2."""
    c = torch.arange(6)
    b = draw(FlowMatching(drop=0), Linear(), torch.zeros(6, 2), c, torch.full_like(c, 9), seed=0, step=0)
    kept = torch.tensor([True, False, True, True, False, True])
    t = torch.arange(6) / 5
    return replace(b, t=t, v_t=torch.full((6, 2), 2.0), kept=kept, c=torch.where(kept, c, 9))


def needing(guide: Guide, b: Noised) -> list[int]:
    """Passes are made for the rows that are guided, and for one where none is: no rank may go without."""
    return guide.rows(b).nonzero().flatten().tolist() or [0]


def guided(guide: Guide, b: Noised, *, have_v_hat: bool = False) -> tuple[Tensor, list[str]]:
    """v*, and the passes that were made for it."""
    passes: list[str] = []

    def velocity(rows: Noised, c: Cond) -> Tensor:
        assert torch.equal(rows.t, b.t[needing(guide, b)])
        null = bool((c == 9).all())
        passes.append("null" if null else "c")
        return torch.full_like(rows.x_t, V_NULL if null else V_C)

    v_hat = torch.full_like(b.x_t, V_C) if have_v_hat else None
    return guide(b, v_hat, velocity), passes


def expected(number: float, rows: list[int]) -> Tensor:
    v = torch.full((6, 2), 2.0)
    v[rows] = number
    return v


KEPT = [0, 2, 3, 5]
MAPS = [  # omega, zeta, v* on guided rows, passes
    (1.0, 0.0, 2.0, []),
    (1.0, 0.5, 2 + 0.5 * (V_C - V_NULL), ["c", "null"]),
    (0.2, 0.9, 0.2 * 2 + 0.9 * V_C - 0.1 * V_NULL, ["c", "null"]),
    (0.5, 0.5, 0.5 * 2 + 0.5 * V_C, ["c"]),
    (0.2, 0.8, 0.2 * 2 + 0.8 * V_C, ["c"]),
    (1.5, 0.0, 1.5 * 2 - 0.5 * V_NULL, ["null"]),
    (0.6, 0.0, 0.6 * 2 + 0.4 * V_NULL, ["null"]),
]


@pytest.mark.parametrize(("omega", "zeta", "v_star", "passes"), MAPS)
def test_every_affine_map(omega: float, zeta: float, v_star: float, passes: list[str]) -> None:
    guide = Guide(omega=omega, zeta=zeta)
    found, made = guided(guide, record())
    assert torch.allclose(found, expected(v_star, KEPT), rtol=0, atol=1e-6)
    assert made == passes  # none of weight zero
    assert guide.active == (made != [])


@pytest.mark.parametrize(("omega", "zeta", "v_star", "passes"), MAPS)
def test_a_velocity_at_hand_saves_its_pass(omega: float, zeta: float, v_star: float, passes: list[str]) -> None:
    found, made = guided(Guide(omega=omega, zeta=zeta), record(), have_v_hat=True)
    assert torch.allclose(found, expected(v_star, KEPT), rtol=0, atol=1e-6)
    assert made == [p for p in passes if p == "null"]


@pytest.mark.parametrize(
    ("low", "high", "rows"),
    [(0.0, 1.0, KEPT), (0.0, 0.75, [0, 2, 3]), (0.3, 1.0, [2, 3, 5]), (0.4, 0.6, [2, 3]), (0.5, 0.55, [])],
)
def test_rows_outside_the_interval_keep_v_t(low: float, high: float, rows: list[int]) -> None:
    """Both ends belong to it. The passes are made even where no row needs them: another rank's rows may."""
    guide = Guide(zeta=0.5, interval=Interval(low=low, high=high))
    found, made = guided(guide, record())
    assert torch.equal(found, expected(1.0, rows))
    assert made == ["c", "null"]
    assert guide.rows(record()).nonzero().flatten().tolist() == rows


AVERAGE = (2.0 + V_C) / 2


@pytest.mark.parametrize(("low", "high", "rows"), [(0.0, 1.0, KEPT), (0.0, 0.75, [0, 2, 3]), (0.5, 0.55, [])])
@pytest.mark.parametrize("omega", [1.0, 0.5])
def test_an_average_elsewhere(low: float, high: float, rows: list[int], omega: float) -> None:
    """Of late rows and of those that lost their label; with V(c) at hand no pass is made for it."""
    guide = Guide(omega=omega, zeta=0.5, interval=Interval(low=low, high=high), elsewhere="average")
    found, made = guided(guide, record(), have_v_hat=True)
    inside = omega * 2 + 0.5 * V_C + (0.5 - omega) * V_NULL
    assert found[rows].tolist() == [[inside, inside]] * len(rows)
    others = [i for i in range(6) if i not in rows]
    assert found[others].tolist() == [[AVERAGE, AVERAGE]] * len(others)
    assert made == ["null"] * (omega != 0.5)


@pytest.mark.parametrize(
    ("guide", "passes"),
    [
        (Guide(zeta=0.5), {"null": [0, 2, 3]}),
        (Guide(omega=1.5), {"null": [0, 2, 3]}),
        (Guide(omega=0.5, zeta=0.5), {}),
        (Guide(zeta=0.5, fraction=0.5), {"null": [0, 2, 4]}),  # of the last two rows neither is to be guided
    ],
)
def test_an_average_without_v_hat_is_one_pass_of_all_rows(guide: Guide, passes: dict[str, list[int]]) -> None:
    guide = guide.model_copy(update={"elsewhere": "average", "interval": Interval(high=0.75)})
    b, seen = replace(record(), x=torch.arange(6.0)[:, None].expand(6, 2)), dict[str, list[int]]()
    b = replace(b, coin=torch.tensor([0.9, 0.1, 0.9, 0.1, 0.9, 0.1]))

    def velocity(some: Noised, c: Cond) -> Tensor:
        name = "null" if c is some.null else "c"
        assert name not in seen
        seen[name] = some.x[:, 0].int().tolist()
        return torch.full_like(some.x_t, V_NULL if name == "null" else V_C)

    found = guide(b, None, velocity)
    assert seen == {"c": [*range(6)], **passes}
    assert found[[1, 4, 5]].tolist() == [[AVERAGE, AVERAGE]] * 3


def test_an_average_leaves_guided_rows_that_were_not_picked_at_v_t() -> None:
    guide = Guide(zeta=0.5, fraction=1 / 3, elsewhere="average")
    b = replace(record(), coin=COINS)  # rows 2 and 3 are picked, each for two
    found = guide(b, torch.full((6, 2), V_C), lambda some, c: torch.full_like(some.x_t, V_NULL))
    stands = 2 + 2 * 0.5 * (V_C - V_NULL)
    assert found[:, 0].tolist() == [2.0, AVERAGE, stands, stands, AVERAGE, 2.0]


def test_without_guidance_there_is_no_elsewhere() -> None:
    b, guide = record(), Guide(interval=Interval(high=0.5), elsewhere="average")
    assert not guide.active
    assert guide.known_target(b) is b.v_t
    assert guided(guide, b, have_v_hat=True)[0] is b.v_t


@pytest.mark.parametrize("elsewhere", ["data", "average"])
def test_every_pass_meets_the_masks_of_its_rows(elsewhere: str) -> None:
    """A null pass drops nothing."""
    b, keys = record(), torch.arange(12, dtype=torch.int32).view(6, 2)
    seen: list[list[int] | None] = []

    def velocity(some: Noised, c: Cond) -> Tensor:
        found = dropout.current(len(some.t))
        seen.append(None if found is None else found[:, 0].tolist())
        return some.x_t

    with dropout.using(keys):
        Guide.model_validate({"zeta": 0.5, "elsewhere": elsewhere})(b, None, velocity)
    assert seen == [[0, 4, 6, 10] if elsewhere == "data" else [0, 2, 4, 6, 8, 10], None]


def test_presets_stand_for_their_numbers() -> None:
    paper, ucgm = (Guide.model_validate(name) for name in ("paper", "ucgm"))
    assert paper == Guide(omega=1.0, zeta=0.55, interval=Interval(low=0, high=1), elsewhere="data", fraction=1)
    assert ucgm == Guide(omega=1.0, zeta=0.44, interval=Interval(low=0, high=0.75), elsewhere="average", fraction=1)
    assert paper == DuMo().guide
    assert set(PRESETS) == {"paper", "ucgm"}
    assert ucgm.scale == pytest.approx(1 / 0.56)
    for name in ("ucmg", "", "Paper"):
        with pytest.raises(ValidationError, match=f"there is no preset '{name}'; valid: paper, ucgm, or the fields"):
            Guide.model_validate(name)


@pytest.mark.parametrize(
    ("omega", "zeta", "scale"), [(1, 0, 1), (1, 0.55, 1 / 0.45), (0.2, 0.92, 2.5), (1.75, 0, 1.75)]
)
def test_effective_scale_is_where_the_map_settles(omega: float, zeta: float, scale: float) -> None:
    """V <- omega v + zeta V + (1 - omega - zeta) V_0, again and again, ends at V_0 + w (v - V_0)."""
    guide = Guide(omega=omega, zeta=zeta)
    v, v_null, settled = 2.0, 5.0, 0.0
    for _ in range(2000):
        settled = omega * v + zeta * settled + (1 - omega - zeta) * v_null
    assert guide.scale == pytest.approx(scale)
    assert settled == pytest.approx(v_null + guide.scale * (v - v_null))


def test_all_rows_are_taken_where_shapes_must_not_depend_on_numbers() -> None:
    b, guide = record(), Guide(zeta=0.5)
    assert guide.needing(b).tolist() == KEPT
    assert guide.needing(b[torch.tensor(KEPT)]) is None  # all are needed
    fields = {name: getattr(b, name).to("meta") for name in ("t", "kept", "coin")}
    assert guide.needing(replace(b, **fields)) is None


def test_what_is_known_before_a_pass() -> None:
    b = record()
    assert Guide().known_target(b) is b.v_t
    assert Guide(interval=Interval(high=0.5), fraction=0.5).known_target(b) is b.v_t
    for guide in (Guide(zeta=0.5), Guide(omega=2), Guide(zeta=0.5, fraction=0.5)):
        assert guide.known_target(b) is None


@pytest.mark.parametrize(("fraction", "every"), [(1, 1), (0.5, 2), (1 / 3, 3), (0.33333333, 3), (0.25, 4), (0.01, 100)])
def test_a_fraction_is_one_row_of_a_whole_number(fraction: float, every: int) -> None:
    guide = Guide(zeta=0.5, fraction=fraction)
    assert guide.every == every
    assert guide.random == (every > 1)
    assert not Guide(fraction=fraction).random


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(0.3, "use 0.25 or 0.333333333333"), (0.75, "use 0.5 or 1"), (0.0003333, "use 0.00033")]
    + [(f, "fraction") for f in (0, -0.25, 1.5, 4)],
)
def test_other_fractions_are_refused(fraction: float, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Guide(fraction=fraction)


@pytest.mark.parametrize("fraction", [0.3, 0.7, 0.15, 0.0003333, 0.00017])
def test_the_fractions_offered_are_taken(fraction: float) -> None:
    with pytest.raises(ValidationError) as refused:
        Guide(fraction=fraction)
    words = str(refused.value).split("use ")[1].split()
    assert [Guide(fraction=float(word)).every for word in (words[0], words[2])] == [
        int(1 / fraction) + 1,
        int(1 / fraction),
    ]


COINS = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.7, 0.2])  # rows 1 and 4 have lost their labels
PICKS = [  # fraction, latest guided time, rows picked, how many guided rows each stands for
    (1 / 2, 1.0, [0, 3, 5], [1, 2, 1]),
    (1 / 3, 1.0, [2, 3], [2, 2]),
    (1 / 6, 1.0, [3], [4]),
    (1 / 3, 0.5, [2, 3], [2, 0]),  # the times of the second group are too late
]


@pytest.mark.parametrize(("fraction", "high", "places", "weights"), PICKS)
def test_the_largest_coin_among_guided_rows_is_picked(
    fraction: float, high: float, places: list[int], weights: list[int]
) -> None:
    """A row that is not to be guided never takes the place of one that is."""
    b = replace(record(), coin=COINS)
    place, weight = Guide(zeta=0.5, fraction=fraction, interval=Interval(high=high)).pick(b)
    stands = weight > 0
    assert place[stands].tolist() == [p for p, w in zip(places, weights, strict=True) if w]
    assert weight.tolist() == weights
    assert (place // round(1 / fraction)).tolist() == list(range(len(places)))


@pytest.mark.parametrize(("fraction", "high", "places", "weights"), PICKS)
@pytest.mark.parametrize("omega", [1.0, 0.3])
@pytest.mark.parametrize("have_v_hat", [False, True])
def test_picked_rows_carry_the_guidance_of_their_group(
    fraction: float, high: float, places: list[int], weights: list[int], omega: float, have_v_hat: bool
) -> None:
    """v_t + M (v*_full - v_t) there, v_t elsewhere; and the passes see the picked rows only, with their own inputs."""
    guide = Guide(omega=omega, zeta=0.5, fraction=fraction, interval=Interval(high=high))
    b = replace(record(), coin=COINS)
    v_hat = b.c[:, None] + torch.tensor([0.0, 0.25])
    seen: list[Noised] = []

    def velocity(some: Noised, c: Cond) -> Tensor:
        seen.append(some)
        return v_hat[some.x[:, 0].long()] if (c != 9).any() or (c is some.c) else 10 * some.t[:, None].expand(-1, 2)

    b = replace(b, x=torch.arange(6.0)[:, None].expand(6, 2))
    found = guide(b, v_hat if have_v_hat else None, velocity)
    expected = b.v_t.clone()
    for p, w in zip(places, weights, strict=True):
        full = omega * b.v_t[p] + 0.5 * v_hat[p] + (0.5 - omega) * 10 * b.t[p]
        expected[p] += w * (full - b.v_t[p])
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert [len(some.t) for some in seen] == [len(places)] * (1 if have_v_hat else 2)


@pytest.mark.parametrize("fraction", [1.0, 1 / 3])
def test_nothing_of_an_unguided_row_is_seen(fraction: float) -> None:
    """Where no row of a group is guided, one goes through the net all the same: whatever comes out, even no number."""
    b = replace(record(), kept=torch.zeros(6, dtype=torch.bool))
    guide = Guide(zeta=0.5, fraction=fraction)
    assert torch.equal(guide(b, None, lambda some, c: torch.full_like(some.x_t, torch.nan)), b.v_t)
    guide, v_hat = guide.model_copy(update={"elsewhere": "average"}), torch.full((6, 2), V_C)
    found = guide(b, v_hat, lambda some, c: torch.full_like(some.x_t, torch.nan))
    assert torch.equal(found, torch.full((6, 2), AVERAGE))


@pytest.mark.parametrize(("data", "net"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("elsewhere", ["data", "average"])
def test_precision_is_that_of_guidance_on_every_row(data: str, net: str, elsewhere: str) -> None:
    low, out = getattr(torch, data), getattr(torch, net)
    b = record()
    b = replace(b, x=b.x.to(low), x_t=b.x_t.to(low), z=b.z.to(low), v_t=b.v_t.to(low))
    fields = {"zeta": 0.5, "elsewhere": elsewhere}
    guides = [Guide.model_validate({**fields, "fraction": f}) for f in (1.0, 1 / 3)]
    made = [guide(b, None, lambda some, c: some.x_t.to(out)) for guide in guides]
    assert made[0].dtype == made[1].dtype == torch.promote_types(low, out)


def test_rows_that_are_no_whole_number_of_groups_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"one of every 4 rows, but here are 6.*train.batch and train.micro_batch multiples of 4"
    ):
        guided(Guide(zeta=0.5, fraction=0.25), record())
    assert guided(Guide(fraction=0.25), record())[1] == []  # nothing to guide, nothing to refuse


def test_the_choice_waits_for_no_number() -> None:
    """On tensors that hold none: so no step waits for its device, and every rank has the same shapes."""
    b, seen = record(), list[int]()
    ghost = {
        name: getattr(b, name).to("meta") for name in ("x", "z", "t", "r", "x_t", "v_t", "c", "null", "kept", "coin")
    }

    def velocity(some: Noised, c: Cond) -> Tensor:
        seen.append(len(some.t))
        return some.x_t

    found = Guide(zeta=0.5, fraction=1 / 3)(replace(b, **ghost), None, velocity)
    assert found.shape == b.x_t.shape
    assert seen == [2, 2]
