"""What answers are worth: by hand, against sacrebleu, rouge-score and scipy, and in cases that have to be decided."""

import json

import numpy as np
import pytest
from llamafactory_video.evaluate.fields import Field, choice_of, fields_of, parse_answer, seconds_of, span_of
from llamafactory_video.evaluate.measures import iou, judge, likeness
from llamafactory_video.evaluate.statistics import AveragePrecision, Ratio, Resampling, mean_of
from llamafactory_video.evaluate.texts import chrf, normalised, rouge_l
from scipy import stats


def value(scored, name, chosen=None):
    figure = scored.figures[name]
    weights = np.ones((1, len(scored.scores))) if chosen is None else chosen[None].astype(float)
    return pytest.approx(float(figure.values(weights)[0]), abs=1e-12, nan_ok=True)


def text(answer):
    return json.dumps(answer, ensure_ascii=False)


LABELS = [
    {"tags": ["凯", "团战"], "scene": "王者峡谷", "kills": 3, "won": True, "about": "凯从侧面切入后排，连续收下了三个人头，随后带队推掉了中路的一座防御塔。"},
    {"tags": ["李白"], "scene": "训练营", "kills": 0, "won": False, "about": "李白在训练营里反复练习连招，一共打了三轮，每一轮都命中了全部技能。"},
    {"tags": ["凯", "推塔"], "scene": "王者峡谷", "kills": 1, "won": True, "about": "双方在中路僵持了很久，凯绕到敌方身后偷掉了二塔，全队随后压上高地。"},
]  # fmt: skip


def test_fields_are_told_by_right_answers():
    nested = [{"hero": {"name": "凯", "at": [1, 2.5]}, "events": [{"start": 1, "end": 2, "tag": "x"}], "odd": 1}]
    assert fields_of(LABELS) == [
        Field(("tags",), "tags"),
        Field(("scene",), "words"),
        Field(("kills",), "number"),
        Field(("won",), "boolean"),
        Field(("about",), "text"),
    ]
    assert fields_of([*nested, {"odd": "a", "items": [{"a": 1}, {"b": 2}]}]) == [
        Field(("hero", "name"), "words"),
        Field(("hero", "at"), "span"),
        Field(("events",), "spans"),
        Field(("odd",), "value"),
        Field(("items",), "objects"),
    ]
    assert fields_of(["A", "(B)"]) == [Field((), "choice")] and fields_of(["一座塔"]) == [Field((), "words")]
    assert fields_of([{"note": "短"}], texts=["note"]) == [Field(("note",), "text")]
    assert fields_of([{"a": None}, {"a": []}]) == [Field(("a",), "tags")] and fields_of([]) == []


def test_times_spans_and_letters():
    assert [seconds_of(t) for t in (3, "3.5s", "1:02", "1:02:03.5", "x", True)] == [3, 3.5, 62, 3723.5, None, None]
    assert span_of({"start": "0:01", "end": 4}) == (1, 4) and span_of([2, 3]) == (2, 3)
    assert span_of({"start": 4, "end": 1}) is None and span_of([1, 2, 3]) is None and span_of("x") is None
    choices = ("B", " (c). 因为", "A：对", "Answer", "Because", "", "答案是B", "D)")
    assert [choice_of(c) for c in choices] == ["B", "C", "A", None, None, None, None, "D"]


def test_right_answers_are_worth_everything_and_none_nothing():
    right = judge(LABELS, [text(label) for label in LABELS])
    assert (right.scores == 1).all()
    for name, figure in right.figures.items():
        best = 0.0 if figure.lower_is_better else 1.0
        assert value(right, name) == best, name
    for nothing in ("", "不知道", "[", None, "{}", "3"):
        wrong = judge(LABELS, [nothing] * 3)
        assert (wrong.scores == 0).all(), nothing
        assert value(wrong, "tags.f1") == value(wrong, "about.rouge_l") == value(wrong, "kills.exact") == 0
        assert value(wrong, "json") == float(nothing in ("{}", "3"))
        assert np.isnan(wrong.figures["kills.error"].values(np.ones((1, 3))))  # no number was said


def test_tags_by_hand():
    answers = [{"tags": ["凯", "凯", "推塔"]}, {"tags": []}, {"tags": ["凯", "推塔 ", "李白", 5]}]
    scored = judge([{"tags": label["tags"]} for label in LABELS], list(map(text, answers)))
    # hits 1, 0, 2; right 2, 1, 2; said (each once) 2, 0, 3
    assert value(scored, "tags.precision") == 3 / 5 and value(scored, "tags.recall") == 3 / 5
    assert value(scored, "tags.f1") == 6 / 10
    assert value(scored, "tags.f1_records") == np.mean([0.5, 0, 0.8])
    # 凯: 2 hits; 团战: missed; 李白: missed once, said once; 推塔: hit, said besides once
    assert value(scored, "tags.f1_macro") == np.mean([1, 0, 0, 2 / 3])
    assert scored.tags["tags"] == {"凯": (2, 0, 0), "团战": (0, 0, 1), "李白": (0, 1, 1), "推塔": (1, 1, 0)}
    assert scored.confusions["tags"] == {("团战", "推塔"): 1.0}
    empty = judge([{"tags": []}, {"tags": ["a"]}], ['{"tags": []}', '{"tags": ["a"]}'])
    assert value(empty, "tags.f1_records") == 1 and value(empty, "tags.f1") == 1


def test_words_numbers_truth_values_and_other_fields_by_hand():
    answers = [
        {"scene": "王者峡谷", "kills": 3.0, "won": 1, "new": 0},
        {"scene": " 训练营。", "kills": 2},
        {"scene": "训练营", "kills": "1"},
    ]
    scored = judge([{k: label[k] for k in ("scene", "kills", "won")} for label in LABELS], list(map(text, answers)))
    assert value(scored, "scene.exact") == 1 / 3 and value(scored, "scene.accuracy") == 2 / 3
    assert scored.confusions["scene"] == {("王者峡谷", "训练营"): 1.0}
    assert value(scored, "kills.exact") == 1 / 3 and value(scored, "kills.error") == 1  # of those that said a number
    assert value(scored, "won.exact") == 0  # 1 is not true
    assert value(scored, "extra_fields") == 1 / 3 and value(scored, "exact") == 0
    assert scored.scores.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    fenced = judge([{"a": 1}], ['```json\n{"a": 1}\n```'])
    assert value(fenced, "exact") == value(fenced, "json") == 1 and parse_answer("NaN") is not None


def test_texts_are_compared_by_the_libraries():
    from rouge_score import rouge_scorer
    from sacrebleu import sentence_chrf

    english = "the hero takes the tower", "a hero takes two towers"
    assert rouge_l(*english) == rouge_scorer.RougeScorer(["rougeL"]).score(*english)["rougeL"].fmeasure
    a, b = LABELS[0]["about"], LABELS[2]["about"]
    assert chrf(a, b) == sentence_chrf(b, [a]).score / 100
    # Characters, not what stands between spaces: 凯从侧面 against 凯从后面 share three of four.
    assert rouge_l("凯从侧面", "凯从后面") == 0.75 and rouge_l("凯从侧面", "") == chrf("凯", "") == 0
    assert normalised("  Ａ ｂ。") == "a b"
    scored = judge([{"about": a}], [text({"about": b})])
    assert value(scored, "about.chrf") == chrf(a, b) and scored.scores[0] == chrf(a, b)


def test_spans_by_hand():
    assert iou((0, 4), (2, 6)) == pytest.approx(2 / 6) and iou((0, 1), (2, 3)) == 0 and iou((1, 1), (1, 1)) == 1
    labels = [{"when": {"start": 0, "end": 4}}, {"when": {"start": 0, "end": 10}}]
    scored = judge(labels, [text({"when": {"start": 2, "end": 6}}), text({"when": ["0:00", "0:06"]})])
    assert value(scored, "when.iou") == (2 / 6 + 0.6) / 2
    assert [value(scored, f"when.recall@{t}") for t in (0.3, 0.5, 0.7)] == [1, 0.5, 0]
    events = [{"start": 0, "end": 4, "tag": "团战"}, {"start": 6, "end": 8, "tag": "推塔"}]
    said = [
        {"start": 6, "end": 8, "tag": "团战"},
        {"start": 6, "end": 7, "tag": "推塔"},
        {"start": 0, "end": 3, "tag": "团战"},
    ]
    scored = judge([{"events": events}], [text({"events": said})])
    assert value(scored, "events.recall@0.5") == 1 and value(scored, "events.recall@0.7") == 0.5
    assert value(scored, "events.f1@0.5") == 4 / 5 and value(scored, "events.iou") == 2 * (0.75 + 0.5) / 5
    # 团战: the first detection misses, the second hits: area 1/2. 推塔: 1.
    assert value(scored, "events.map@0.5") == 0.75


def test_average_precision_counts_a_repeated_record_as_often_as_it_is_drawn():
    random = np.random.default_rng(0)
    wanted, drawn = random.integers(0, 3, (6, 2)).astype(float), np.array([2, 0, 1, 3, 0, 1])
    hits = [(random.random(9) < 0.5, random.integers(0, 6, 9)) for _ in range(2)]
    weighted = AveragePrecision(hits, wanted).values(drawn[None].astype(float))
    rows = np.repeat(np.arange(6), drawn)
    copies = [
        (
            np.concatenate([np.repeat(h, drawn[r]) for h, r in zip(is_hit, record, strict=True)]).astype(bool),
            np.concatenate([np.flatnonzero(rows == r) for r in record]),
        )
        for is_hit, record in hits
    ]
    written_out = AveragePrecision(copies, wanted[rows]).values(np.ones((1, len(rows))))
    # Copies of one detection stand beside each other, so precision within them differs; all else is the same.
    assert weighted == pytest.approx(written_out, abs=0.12)
    plain = AveragePrecision([(np.array([True, False, True]), np.array([0, 1, 2]))], np.array([[1.0], [0], [1]]))
    assert plain.values(np.ones((1, 3))) == pytest.approx([0.5 * 1 + 0.5 * 2 / 3])  # by hand


def test_lists_of_objects_are_paired_so_that_they_are_most_alike():
    heroes = [{"name": "凯", "kills": 3}, {"name": "李白", "kills": 1}]
    scored = judge([{"heroes": heroes}], [text({"heroes": heroes[::-1]})])
    assert value(scored, "heroes.f1") == 1
    scored = judge([{"heroes": heroes}], [text({"heroes": [{"name": "李白", "kills": 2}]})])
    assert value(scored, "heroes.f1") == 2 * 0.5 / 3
    assert likeness({"a": 1}, {"a": 1, "b": 2}) == 0.5 and likeness([], []) == 1 and likeness(1, True) == 0


def test_choices_and_plain_texts():
    scored = judge(["A", "B", "C"], ["A", "(b) 因为", "D"])
    assert value(scored, "accuracy") == 2 / 3 and "json" not in scored.figures
    scored = judge(["一座塔", "一条河"], ["一座塔。", "山"])
    assert value(scored, "accuracy") == 0.5 and value(scored, "exact") == 0
    scored = judge(['{"a": 1}'], ['{"a": 2}'])  # labels of another program's predictions are texts
    assert value(scored, "json") == 1 and value(scored, "a.error") == 1


def test_a_schema_is_held_against_answers():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    scored = judge([{"a": 1}] * 3, ['{"a": 5}', '{"a": "x"}', "["], schema=schema)
    assert value(scored, "schema") == 1 / 3


# --- How sure a figure is --------------------------------------------------------------------------------------------


def test_intervals_are_scipys_where_every_record_is_a_source():
    values = np.random.default_rng(1).random(80)
    ours = Resampling(list(range(80)), seed=3, draws=6000).interval(mean_of(values))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=6000, method="percentile", rng=4).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_p_values_are_scipys():
    random = np.random.default_rng(2)
    first, second = random.random(40), random.random(40) + 0.12
    ours = Resampling(list(range(40)), draws=6000).difference(mean_of(first), mean_of(second))
    theirs = stats.permutation_test(
        (second, first), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=6000, rng=5
    )
    assert ours.value == pytest.approx((second - first).mean())
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.02) and ours.low < ours.value < ours.high


def test_clips_of_one_recording_count_as_one():
    """Ten copies of each record make a figure no surer."""
    values = np.random.default_rng(3).random(30)
    once = Resampling(list(range(30))).interval(mean_of(values))
    copied = Resampling(np.repeat(range(30), 10).tolist()).interval(mean_of(np.repeat(values, 10)))
    apart = Resampling(list(range(300))).interval(mean_of(np.repeat(values, 10)))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    assert apart.high - apart.low < 0.5 * (once.high - once.low)


def test_what_is_alike_differs_by_nothing_and_the_seed_decides():
    figure = Ratio(np.random.default_rng(4).random((50, 3)), np.ones((50, 3)))
    sources = [i // 5 for i in range(50)]
    alike = Resampling(sources).difference(figure, figure)
    assert (alike.value, alike.low, alike.high, alike.p) == (0, 0, 0, 1)
    assert Resampling(sources, 7).interval(figure) == Resampling(sources, 7).interval(figure)
    assert Resampling(sources, 7).interval(figure) != Resampling(sources, 8).interval(figure)
    nothing = Resampling(sources).interval(mean_of(np.ones(50), np.zeros(50, bool)))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Of 300 experiments whose truth is known, 95 in 100 have it within their bounds."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        values = random.random(40) < 0.7
        found = Resampling(list(range(40)), draws=500).interval(mean_of(values))
        held += found.low <= 0.7 <= found.high
    assert 0.9 < held / 300 <= 0.99


def test_a_part_of_the_records_is_a_figure_of_its_own():
    chosen = np.arange(20) < 5
    values = np.arange(20) / 20
    found = Resampling(list(range(20))).interval(mean_of(values), chosen)
    assert found.value == pytest.approx(values[:5].mean()) and found.low >= 0 and found.high <= 0.2
