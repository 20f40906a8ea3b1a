"""What several rows begin with, which is read once."""

from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.evaluation.beginnings import padded_width, shared_beginnings

SYSTEM = list(range(10))


def test_rows_about_a_record_share_it_and_the_system_prompt_alone_is_not_shared():
    first, second = [*SYSTEM, *range(20, 50)], [*SYSTEM, *range(60, 90)]
    prompts = [[*first, 1, 2], [*second, 1], [*first, 1, 3, 4], [*second, 5, 6]]
    assert sorted(shared_beginnings(prompts, [()] * 4, [0] * 4)) == [(40, [1, 3]), (41, [0, 2])]


def test_a_token_is_left_of_each():
    prompts = [[*SYSTEM, 1], [*SYSTEM, 1], [*SYSTEM, 1, 2]]
    assert shared_beginnings(prompts, [()] * 3, [0] * 3) == [(10, [0, 1, 2])]


def test_other_ecgs_behind_the_same_tokens():
    assert shared_beginnings([[*SYSTEM, 1], [*SYSTEM, 2]], [("a",), ("b",)], [8, 8]) == []


def test_no_ecg_is_cut():
    """Two ECGs, of which the first alone stands before the questions part."""
    prompts = [[*SYSTEM, 1, 7, 7, 3], [*SYSTEM, 2, 7, 7, 3]]
    assert shared_beginnings(prompts, [("a", "b")] * 2, [13, 13]) == []
    assert shared_beginnings(prompts, [("a",)] * 2, [9, 9]) == [(10, [0, 1])]


def test_little_in_common_is_not_worth_a_step():
    assert shared_beginnings([[1, 2, *range(10, 40)], [1, 2, *range(50, 80)]], [()] * 2, [0] * 2) == []


def test_width_of_rows_that_are_longest_in_different_turns():
    assert padded_width([[7, 8, 12], [2, 9], [5]]) == 7 + 7 + 7 + 4


@given(
    st.lists(
        st.tuples(
            st.sampled_from([(), ("a",)]), st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(0, 12)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_groups_are_what_they_say(rows):
    ecgs, prompts, least = zip(*((ecg, ids, min(low, len(ids) - 1)) for ecg, ids, low in rows), strict=True)
    groups = shared_beginnings(prompts, ecgs, least)
    if not groups:
        return
    assert sorted(row for _, members in groups for row in members) == list(range(len(rows)))
    assert sum(length * (len(members) - 1) for length, members in groups) >= sum(map(len, prompts)) / 4
    for length, members in groups:
        assert len({(ecgs[row], tuple(prompts[row][:length])) for row in members}) == 1
        assert all(least[row] <= length < len(prompts[row]) for row in members)
