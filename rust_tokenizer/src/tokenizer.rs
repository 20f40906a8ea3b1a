//! The tokenizer, and its JSON file.

use std::collections::HashMap;
use std::num::NonZero;
use std::thread;

use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::automaton::{Automaton, FIRST_MERGE_ID, PADDING};
use crate::quantize::Scale;
use crate::{Ecg, Error};

const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz";
const KEYS: [&str; 8] =
    ["format", "version", "alphabet", "normalization", "millivolt_range", "across_leads", "sampling_rate", "merges"];

#[derive(Clone, Debug)]
pub struct Tokenizer {
    merges: Vec<String>,
    millivolt_range: Option<(f64, f64)>,
    across_leads: bool,
    sampling_rate: Option<f64>,
    automaton: Automaton,
}

impl Tokenizer {
    /// A tokenizer whose merge i has id 256 + i.
    ///
    /// Records are scaled from `millivolt_range`, or where that is None from their lowest to their highest value. With
    /// `across_leads` a token may run from one lead into the next. `sampling_rate` in hertz is only kept.
    pub fn new(
        merges: Vec<String>,
        millivolt_range: Option<(f64, f64)>,
        across_leads: bool,
        sampling_rate: Option<f64>,
    ) -> Result<Tokenizer, Error> {
        if let Some((low, high)) = millivolt_range {
            check_range(low, high, || format!("({low:?}, {high:?})"))?;
        }
        if let Some(rate) = sampling_rate {
            check_rate(rate, || format!("{rate:?}"))?;
        }
        let mut seen = HashMap::with_capacity(merges.len());
        let mut strings = Vec::with_capacity(merges.len());
        for (number, merge) in merges.iter().enumerate() {
            let name = || format!("merge {number} ({})", quoted(merge));
            if let Some(symbol) = merge.chars().find(|symbol| !symbol.is_ascii_lowercase()) {
                return Err(Error(format!("{} holds {}; symbols are a to z", name(), quoted(&symbol.to_string()))));
            }
            if merge.len() < 2 {
                let symbols = if merge.is_empty() { "0 symbols" } else { "1 symbol" };
                return Err(Error(format!("{} has {symbols}; expected at least 2", name())));
            }
            if let Some(earlier) = seen.insert(merge.as_str(), number) {
                return Err(Error(format!("{} is also merge {earlier}", name())));
            }
            strings.push(merge.bytes().map(|byte| byte - b'a').collect::<Vec<u8>>());
        }
        let automaton = Automaton::new(&strings);
        Ok(Tokenizer { merges, millivolt_range, across_leads, sampling_rate, automaton })
    }

    /// Reads the JSON file `ecg_byte.json`, version 1, with exactly its keys.
    pub fn from_json(text: &str) -> Result<Tokenizer, Error> {
        let value: Value = serde_json::from_str(text).map_err(|error| Error(format!("not valid JSON: {error}")))?;
        let Value::Object(mut members) = value else {
            return Err(Error("expected a JSON object".into()));
        };
        if let Some(key) = KEYS.iter().find(|&&key| !members.contains_key(key)) {
            return Err(Error(format!("missing key '{key}'")));
        }
        if let Some(key) = members.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(Error(format!("unknown key {}", quoted(key))));
        }
        expect(&members, "format", |value| value == "ecg_byte", "expected 'ecg_byte'")?;
        expect(&members, "version", |value| value.as_u64() == Some(1), "this code reads version 1")?;
        expect(&members, "alphabet", |value| value == ALPHABET, &format!("expected '{ALPHABET}'"))?;
        expect(
            &members,
            "normalization",
            |value| value == "minmax" || value == "millivolt",
            "expected 'minmax' or 'millivolt'",
        )?;
        let range = &members["millivolt_range"];
        let millivolt_range = if members["normalization"] == "minmax" {
            expect(&members, "millivolt_range", Value::is_null, "expected null with normalization 'minmax'")?;
            None
        } else {
            let limits = range.as_array().map(|limits| limits.iter().map(Value::as_f64).collect::<Vec<_>>());
            let (low, high) = match limits.as_deref() {
                Some(&[Some(low), Some(high)]) => (low, high),
                _ => (f64::NAN, f64::NAN),
            };
            check_range(low, high, || shown(range))?;
            Some((low, high))
        };
        let rate = &members["sampling_rate"];
        let sampling_rate = if rate.is_null() { None } else { Some(rate.as_f64().unwrap_or(f64::NAN)) };
        if let Some(number) = sampling_rate {
            check_rate(number, || shown(rate))?;
        }
        expect(&members, "across_leads", Value::is_boolean, "expected true or false")?;
        expect(&members, "merges", Value::is_array, "expected a list of [string, id]")?;
        let across_leads = members["across_leads"] == true;
        let Some(Value::Array(entries)) = members.remove("merges") else { unreachable!() };
        let mut merges = Vec::with_capacity(entries.len());
        for (number, entry) in entries.into_iter().enumerate() {
            let (merge, id) = match entry.as_array().map(Vec::as_slice) {
                Some([Value::String(merge), Value::Number(id)]) if !id.is_f64() => (merge, id),
                _ => {
                    return Err(Error(format!("merge {number} is {}; expected [string, id]", shown(&entry))));
                }
            };
            let expected = FIRST_MERGE_ID as u64 + number as u64;
            if id.as_u64() != Some(expected) {
                return Err(Error(format!("merge {number} ({}) has id {id}; expected {expected}", quoted(merge))));
            }
            merges.push(merge.clone());
        }
        Tokenizer::new(merges, millivolt_range, across_leads, sampling_rate)
    }

    pub fn merges(&self) -> &[String] {
        &self.merges
    }

    pub fn millivolt_range(&self) -> Option<(f64, f64)> {
        self.millivolt_range
    }

    pub fn across_leads(&self) -> bool {
        self.across_leads
    }

    pub fn sampling_rate(&self) -> Option<f64> {
        self.sampling_rate
    }

    /// The ids of one record.
    pub fn encode(&self, ecg: Ecg) -> Result<Vec<u32>, Error> {
        let range = self.millivolt_range.map(|(low, high)| (low as f32, high as f32));
        let scale = Scale::of(ecg.values, range)?;
        let part = if self.across_leads { ecg.values.len() } else { ecg.samples };
        let mut symbols = Vec::with_capacity(part + PADDING);
        let mut ids = Vec::new();
        for values in ecg.values.chunks(part) {
            symbols.resize(values.len(), 0);
            scale.quantize(values, &mut symbols);
            self.automaton.encode(&mut symbols, &mut ids);
        }
        Ok(ids)
    }

    /// The ids of each record, on `num_threads` threads (None: one for each core).
    pub fn encode_batch(&self, ecgs: &[Ecg], num_threads: Option<usize>) -> Result<Vec<Vec<u32>>, Error> {
        let encode = |(number, ecg): (usize, &Ecg)| {
            self.encode(*ecg).map_err(|error| Error(format!("record {number}: {error}")))
        };
        let all_cores = || thread::available_parallelism().map_or(1, NonZero::get);
        let num_threads = num_threads.unwrap_or_else(all_cores).min(ecgs.len());
        if num_threads <= 1 {
            return ecgs.iter().enumerate().map(encode).collect();
        }
        // threads of this call alone: those of a global pool do not survive the fork of a data loader's worker
        let pool = ThreadPoolBuilder::new()
            .num_threads(num_threads)
            .build()
            .map_err(|error| Error(format!("cannot start {num_threads} threads: {error}")))?;
        pool.install(|| ecgs.par_iter().enumerate().map(encode).collect())
    }

    /// The amplitudes, in millivolts, of the tokens' symbols, where symbol a stands at `low` and symbol z at `high`.
    pub fn decode(&self, ids: &[u32], low: f32, high: f32) -> Result<Vec<f32>, Error> {
        self.automaton.decode(ids, low, high)
    }
}

/// `shown` is the range in the error.
pub fn check_range(low: f64, high: f64, shown: impl Fn() -> String) -> Result<(), Error> {
    // as they are used: a range may vanish, or become infinite, in float32
    let (low, high) = (low as f32, high as f32);
    if low.is_finite() && high.is_finite() && low < high {
        return Ok(());
    }
    Err(Error(format!(
        "millivolt_range is {}; expected two finite numbers, low < high, with normalization 'millivolt'",
        shown()
    )))
}

fn check_rate(rate: f64, shown: impl Fn() -> String) -> Result<(), Error> {
    if rate.is_finite() && rate > 0.0 {
        return Ok(());
    }
    Err(Error(format!("sampling_rate is {}; expected a positive number or null", shown())))
}

fn expect(members: &Map<String, Value>, key: &str, valid: impl Fn(&Value) -> bool, wanted: &str) -> Result<(), Error> {
    let value = &members[key];
    if valid(value) { Ok(()) } else { Err(Error(format!("{key} is {}; {wanted}", shown(value)))) }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.escape_debug())
}

/// A JSON value as Python writes it, for error messages.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(", ")),
        Value::Object(members) => {
            let members = members.iter().map(|(key, value)| format!("{}: {}", quoted(key), shown(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
        }
    }
}
