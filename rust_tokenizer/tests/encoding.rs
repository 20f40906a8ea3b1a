//! Encoding and decoding against slow, readable ones.

use std::collections::HashMap;

use ecg_byte::{Ecg, Tokenizer};
use proptest::prelude::*;
use proptest::sample::Index;

/// In this range symbol k is the millivolts from k to k + 1.
const RANGE: (f64, f64) = (0.0, 26.0);

fn millivolts(symbols: &str) -> Vec<f32> {
    symbols.bytes().map(|byte| f32::from(byte - b'a') + 0.5).collect()
}

/// At each place the longest of all tokens.
fn longest_matches(merges: &[String], symbols: &str) -> Vec<u32> {
    let numbers: HashMap<&str, u32> = merges.iter().map(String::as_str).zip(256..).collect();
    let longest = merges.iter().map(String::len).max().unwrap_or(1);
    let mut ids = Vec::new();
    let mut rest = symbols;
    while !rest.is_empty() {
        let found = (2..=longest.min(rest.len())).rev().find_map(|len| Some((len, *numbers.get(&rest[..len])?)));
        let (len, id) = found.unwrap_or((1, u32::from(rest.as_bytes()[0])));
        ids.push(id);
        rest = &rest[len..];
    }
    ids
}

/// Runs, a few letters and the whole alphabet; around the 16 symbols of a chunk as well as far above.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]{1,6}", "[a-c]{2,20}", "[a-z]{1,4}", "a{1,40}", "z{14,18}", "(ab){1,30}", "b{30,70}"]
}

fn merges() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(prop::collection::vec(piece(), 1..3).prop_map(|pieces| pieces.concat()), 0..80).prop_map(
        |mut merges| {
            merges.retain(|merge| merge.len() > 1);
            merges.sort();
            merges.dedup();
            merges.sort_by_key(|merge| merge.bytes().rev().collect::<Vec<_>>()); // the ids in no helpful order
            merges
        },
    )
}

/// Merges, and a string of whole merges, beginnings of merges and other pieces.
fn merges_and_symbols() -> impl Strategy<Value = (Vec<String>, String)> {
    let part = (any::<Index>(), any::<Index>(), piece(), 0..4);
    (merges(), prop::collection::vec(part, 1..300), 0..3000usize).prop_map(|(merges, parts, run)| {
        let mut symbols = String::new();
        for (merge, len, piece, kind) in parts {
            match kind {
                0 => symbols += &piece,
                1 if !merges.is_empty() => {
                    let merge = merge.get(&merges);
                    symbols += &merge[..=len.index(merge.len())];
                }
                _ if !merges.is_empty() => symbols += &merges[merge.index(merges.len())],
                _ => symbols += "a",
            }
        }
        symbols += &"a".repeat(run);
        (merges, symbols)
    })
}

proptest! {
    #[test]
    fn encodes_the_longest_matches((merges, symbols) in merges_and_symbols()) {
        let tokenizer = Tokenizer::new(merges.clone(), Some(RANGE), true, None).unwrap();
        let values = millivolts(&symbols);
        let ids = tokenizer.encode(Ecg { values: &values, samples: values.len() }).unwrap();
        prop_assert_eq!(&ids, &longest_matches(&merges, &symbols));
        let levels: Vec<f32> = symbols.bytes().map(|byte| f32::from(byte - b'a') / 25.0 * 26.0).collect();
        prop_assert_eq!(tokenizer.decode(&ids, 0.0, 26.0).unwrap(), levels);
    }

    #[test]
    fn leads_are_matched_apart((merges, symbols) in merges_and_symbols(), num_leads in 1..13usize) {
        let samples = symbols.len().div_ceil(num_leads);
        let symbols: String = symbols.chars().cycle().take(num_leads * samples).collect();
        let values = millivolts(&symbols);
        let ecg = Ecg { values: &values, samples };
        let tokenizer = Tokenizer::new(merges.clone(), Some(RANGE), false, None).unwrap();
        let leads = symbols.as_bytes().chunks(samples).map(|lead| std::str::from_utf8(lead).unwrap());
        let expected: Vec<u32> = leads.flat_map(|lead| longest_matches(&merges, lead)).collect();
        prop_assert_eq!(tokenizer.encode(ecg).unwrap(), expected);
    }

    #[test]
    fn decoding_is_off_by_a_symbol_at_most(
        merges in merges(),
        values in prop::collection::vec(-5.0f32..5.0, 1..2000),
        range in prop::option::of((-5.0..-0.1, 0.1..5.0)),
    ) {
        let tokenizer = Tokenizer::new(merges, range, true, None).unwrap();
        let (low, high) = match range {
            Some((low, high)) => (low as f32, high as f32),
            None => (values.iter().copied().fold(5.0, f32::min), values.iter().copied().fold(-5.0, f32::max)),
        };
        let ids = tokenizer.encode(Ecg { values: &values, samples: values.len() }).unwrap();
        let decoded = tokenizer.decode(&ids, low, high).unwrap();
        prop_assert_eq!(decoded.len(), values.len());
        for (decoded, value) in decoded.into_iter().zip(values) {
            prop_assert!((decoded - value.clamp(low, high)).abs() <= (high - low) / 26.0 + 1e-5);
        }
    }

    #[test]
    fn the_symbols_are_those_of_the_formula(values in prop::collection::vec(-1e3f32..1e3, 1..100), scale in -40..30i32) {
        let values: Vec<f32> = values.into_iter().map(|value| value * 2f32.powi(scale)).collect();
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let symbols = values.iter().map(|value| {
            let normalized = (value - low) / ((high - low) + 1e-6);
            97 + ((normalized.clamp(0.0, 1.0) * 26.0).floor() as u32).min(25)
        });
        let tokenizer = Tokenizer::new(vec![], None, true, None).unwrap();
        let ids = tokenizer.encode(Ecg { values: &values, samples: values.len() }).unwrap();
        prop_assert_eq!(ids, symbols.collect::<Vec<_>>());
    }

    #[test]
    fn one_bad_value_is_found_anywhere(
        len in 1..200usize,
        place: Index,
        bad in prop::sample::select(vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        range in prop::sample::select(vec![None, Some((-1.0, 1.0))]),
    ) {
        let mut values = vec![0.5; len];
        values[place.index(len)] = bad;
        let tokenizer = Tokenizer::new(vec![], range, true, None).unwrap();
        let error = tokenizer.encode(Ecg { values: &values, samples: len }).unwrap_err();
        prop_assert_eq!(error.to_string(), "The ECG holds NaN or infinite values; expected finite millivolts.");
    }
}

#[test]
fn a_fixed_range_clips() {
    let tokenizer = Tokenizer::new(vec![], Some((-1.0, 1.0)), true, None).unwrap();
    let values = [-3e38, -1.0, 0.0, 1.0, 3e38];
    assert_eq!(tokenizer.encode(Ecg { values: &values, samples: 5 }).unwrap(), [97, 97, 97 + 13, 122, 122]);
}

#[test]
fn a_constant_record_is_all_a() {
    let tokenizer = Tokenizer::new(vec!["aaaa".into()], None, true, None).unwrap();
    let values = vec![-0.7; 4 * 2500 + 1];
    let mut expected = vec![256; 2500];
    expected.push(97);
    assert_eq!(tokenizer.encode(Ecg { values: &values, samples: values.len() }).unwrap(), expected);
}

#[test]
fn a_batch_is_its_records() {
    let tokenizer = Tokenizer::new(vec!["ab".into(), "aba".into()], None, true, None).unwrap();
    let records: Vec<Vec<f32>> = (0..50).map(|len| (0..len + 1).map(|value| (value % 7) as f32).collect()).collect();
    let ecgs: Vec<Ecg> = records.iter().map(|values| Ecg { values, samples: values.len() }).collect();
    let expected: Vec<Vec<u32>> = ecgs.iter().map(|&ecg| tokenizer.encode(ecg).unwrap()).collect();
    for num_threads in [None, Some(1), Some(2), Some(100)] {
        assert_eq!(tokenizer.encode_batch(&ecgs, num_threads).unwrap(), expected);
    }
    assert!(tokenizer.encode_batch(&[], None).unwrap().is_empty());
}

#[test]
fn errors_say_what_was_expected() {
    let tokenizer = Tokenizer::new(vec!["ab".into()], None, true, None).unwrap();
    let error = |values: &[f32]| tokenizer.encode(Ecg { values, samples: values.len() }).unwrap_err().to_string();
    assert_eq!(error(&[]), "The ECG is empty; expected at least one sample.");
    assert_eq!(error(&[-3e38, 3e38]), "The range from -3e38 to 3e38 mV overflows float32; expected millivolts.");
    let good = Ecg { values: &[1.0, 2.0], samples: 2 };
    let bad = Ecg { values: &[1.0, f32::NAN], samples: 2 };
    for num_threads in [1, 2] {
        let error = tokenizer.encode_batch(&[good, bad, good], Some(num_threads)).unwrap_err().to_string();
        assert_eq!(error, "record 1: The ECG holds NaN or infinite values; expected finite millivolts.");
    }
    for id in [0, 96, 123, 255, 257, u32::MAX] {
        let error = tokenizer.decode(&[97, id], 0.0, 1.0).unwrap_err().to_string();
        assert_eq!(error, format!("id {id} at 1 is no token; the last is 256"));
    }
}
