//! Training against the counting of all pairs anew for each merge.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::ControlFlow;

use ecg_byte::{Ecg, Options, train};
use proptest::prelude::*;

fn recount(strings: &[String], num_merges: usize, min_frequency: u32) -> Vec<String> {
    let mut tokens: Vec<String> = ('a'..='z').map(String::from).collect();
    let mut parts: Vec<Vec<usize>> =
        strings.iter().map(|string| string.bytes().map(|byte| (byte - b'a') as usize).collect()).collect();
    while tokens.len() < 26 + num_merges {
        let mut counts: HashMap<(usize, usize), u32> = HashMap::new();
        for pair in parts.iter().flat_map(|part| part.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let best = counts.into_iter().max_by_key(|&(pair, count)| (count, Reverse(pair)));
        let Some(((left, right), _)) = best.filter(|&(_, count)| count >= min_frequency) else { break };
        let string = format!("{}{}", tokens[left], tokens[right]);
        let merged = tokens.iter().position(|token| *token == string).unwrap_or_else(|| {
            tokens.push(string);
            tokens.len() - 1
        });
        for part in &mut parts {
            let mut place = 0;
            while place + 1 < part.len() {
                if (part[place], part[place + 1]) == (left, right) {
                    part.splice(place..place + 2, [merged]);
                }
                place += 1;
            }
        }
    }
    tokens.split_off(26)
}

fn learn(records: &[Vec<String>], num_merges: usize, across_leads: bool, min_frequency: u32) -> Vec<String> {
    let values: Vec<Vec<f32>> =
        records.iter().map(|leads| leads.concat().bytes().map(|byte| f32::from(byte - b'a') + 0.5).collect()).collect();
    let ecgs: Vec<Ecg> =
        records.iter().zip(&values).map(|(leads, values)| Ecg { values, samples: leads[0].len() }).collect();
    let options = Options { num_merges, millivolt_range: Some((0.0, 26.0)), across_leads, min_frequency };
    train(&ecgs, options, |_, _| ControlFlow::Continue(())).unwrap()
}

/// Records of 1 to 4 leads of one length: few letters, for many ties and many ways to one string.
fn records() -> impl Strategy<Value = Vec<Vec<String>>> {
    let lead = prop_oneof!["[ab]{60}", "[a-c]{60}", "a{60}", "(a{1,9}b{1,3}){30}"];
    let record = (1..61usize, prop::collection::vec(lead, 1..5)).prop_map(|(samples, mut leads)| {
        leads.iter_mut().for_each(|lead| lead.truncate(samples));
        leads
    });
    prop::collection::vec(record, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn learns_what_recounting_learns(
        records in records(), num_merges in 0..80usize, across_leads: bool, min_frequency in 0..4u32
    ) {
        let parts: Vec<String> = if across_leads {
            records.iter().map(|leads| leads.concat()).collect()
        } else {
            records.concat()
        };
        // a pair that is nowhere is never merged
        let expected = recount(&parts, num_merges, min_frequency.max(1));
        prop_assert_eq!(learn(&records, num_merges, across_leads, min_frequency), expected);
    }
}

fn one(strings: &[&str]) -> Vec<Vec<String>> {
    strings.iter().map(|string| vec![string.to_string()]).collect()
}

#[test]
fn overlapping_pairs_count_and_runs_merge_from_the_left() {
    assert_eq!(learn(&one(&["aaaa", "bcxbc"]), 1, true, 3), ["aa"]);
    // from the right, "a aa b" would make "aab"
    assert_eq!(learn(&one(&["aaabaaab"]), 3, true, 2), ["aa", "ab", "aaab"]);
}

#[test]
fn ties_go_to_the_smallest_ids() {
    assert_eq!(learn(&one(&["zyzy", "bcbc", "bdbd"]), 1, true, 2), ["bc"]);
}

#[test]
fn no_pair_crosses_records_nor_separate_leads() {
    assert!(learn(&one(&["a", "b", "a", "b"]), 9, true, 1).is_empty());
    let records = vec![vec!["ab".to_string(), "cd".to_string()]; 3];
    assert_eq!(learn(&records, 9, true, 1), ["ab", "cd", "abcd"]);
    assert_eq!(learn(&records, 9, false, 1), ["ab", "cd"]);
}

#[test]
fn the_callback_is_told_and_may_end_the_training() {
    let values = [0.0, 1.0].repeat(50);
    let ecgs = [Ecg { values: &values, samples: 100 }];
    let options = Options { num_merges: 5, millivolt_range: None, across_leads: true, min_frequency: 1 };
    let mut told = Vec::new();
    let merges = train(&ecgs, options, |merges, count| {
        told.push((merges, count));
        if merges == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(merges.unwrap(), ["az", "azaz"]);
    assert_eq!(told, [(1, 50), (2, 49)]);
}

#[test]
fn bad_records_and_ranges_are_named() {
    let options = Options { num_merges: 5, millivolt_range: None, across_leads: true, min_frequency: 1 };
    let ecgs = [Ecg { values: &[1.0], samples: 1 }, Ecg { values: &[f32::NAN], samples: 1 }];
    let error = train(&ecgs, options, |_, _| ControlFlow::Continue(())).unwrap_err().to_string();
    assert_eq!(error, "record 1: The ECG holds NaN or infinite values; expected finite millivolts.");
    let options = Options { millivolt_range: Some((1.0, 1.0)), ..options };
    let error = train(&ecgs, options, |_, _| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.starts_with("millivolt_range is (1.0, 1.0); expected two finite numbers"), "{error}");
}
