from elm_ecg.training.evaluation.scale import MetricScale, scales_of, title_of

BPM = MetricScale(title="error of the rate", unit="bpm", high=None, higher_is_better=False)


def test_a_share_is_shown_in_percent():
    scale = MetricScale(title="exact match")
    assert scale.number(0.125) == "12.5"
    assert scale.number(0.5, "+") == "+50.0"
    assert scale.number(None) == "undefined"
    assert scale.with_interval({"value": 0.875, "interval_95": [0.8, 0.95]}) == "87.5 [80.0, 95.0]"
    row = {"difference": 0.1, "interval_95": [-0.1, 0.3]}
    assert scale.with_interval(row, "difference", "+") == "+10.0 [-10.0, 30.0]"
    assert scale.with_interval({"value": 0.5, "interval_95": None}) == "50.0"
    assert scale.with_interval({"value": None, "interval_95": None}) == "undefined"
    assert (scale.with_unit("50.0"), scale.gain(-0.1), scale.heading) == (
        "50.0%",
        "10.0 points of exact match",
        "exact match",
    )


def test_a_metric_in_units_is_not_multiplied_by_100():
    assert BPM.with_interval({"value": 3.25, "interval_95": [2.5, 4.0]}) == "3.2 [2.5, 4.0]"
    assert BPM.with_unit("3.2") == "3.2 bpm"
    assert BPM.gain(2.0) == "2.0 bpm of error of the rate"
    assert BPM.heading == "error of the rate (bpm, lower is better)"
    assert MetricScale(title="edits", unit="", decimals=2).with_unit("1.25") == "1.25"


def test_a_lower_error_is_an_improvement():
    assert BPM.improvement([-3.0, -1.0]) == (1.0, 3.0)
    assert MetricScale().improvement([-3.0, -1.0]) == (-3.0, -1.0)


def test_the_results_hold_scales():
    assert scales_of({"metrics": {"rate": BPM.to_dict()}}) == {"rate": BPM}


def test_title_of():
    assert (title_of("auroc"), title_of("exact_match")) == ("AUROC", "exact match")
