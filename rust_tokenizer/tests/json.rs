//! The loader of `ecg_byte.json`: damaged and hostile files are errors that name the fault, never a panic.

use std::collections::HashSet;

use ecg_byte::Tokenizer;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz";

fn example() -> Value {
    json!({
        "format": "ecg_byte", "version": 1, "alphabet": ALPHABET, "normalization": "millivolt",
        "millivolt_range": [-2.5, 2], "across_leads": true, "sampling_rate": 250,
        "merges": [["mm", 256], ["ll", 257], ["mml", 258]],
    })
}

fn error(text: &str) -> String {
    Tokenizer::from_json(text).unwrap_err().to_string()
}

/// The error where the example's `key` is `value`.
fn error_with(key: &str, value: Value) -> String {
    let mut content = example();
    content[key] = value;
    error(&content.to_string())
}

#[test]
fn reads_a_valid_file() {
    let tokenizer = Tokenizer::from_json(&example().to_string()).unwrap();
    assert_eq!(tokenizer.merges(), ["mm", "ll", "mml"]);
    assert_eq!(tokenizer.millivolt_range(), Some((-2.5, 2.0)));
    assert!(tokenizer.across_leads());
    assert_eq!(tokenizer.sampling_rate(), Some(250.0));

    let mut content = example();
    content["normalization"] = "minmax".into();
    content["millivolt_range"] = Value::Null;
    content["sampling_rate"] = Value::Null;
    content["across_leads"] = false.into();
    content["merges"] = json!([]);
    let tokenizer = Tokenizer::from_json(&content.to_string()).unwrap();
    assert_eq!(tokenizer.merges().len(), 0);
    assert_eq!(tokenizer.millivolt_range(), None);
    assert!(!tokenizer.across_leads());
    assert_eq!(tokenizer.sampling_rate(), None);
}

#[test]
fn errors_name_the_fault() {
    assert!(error("{\"format\": ").starts_with("not valid JSON: "));
    assert!(error(&"[".repeat(100_000)).starts_with("not valid JSON: "));
    assert_eq!(error("[]"), "expected a JSON object");
    let mut content = example();
    content.as_object_mut().unwrap().remove("sampling_rate");
    assert_eq!(error(&content.to_string()), "missing key 'sampling_rate'");
    assert_eq!(error_with("speed", json!(1)), "unknown key 'speed'");

    for (key, value, message) in [
        ("format", json!("x"), "format is 'x'; expected 'ecg_byte'"),
        ("version", json!(2), "version is 2; this code reads version 1"),
        ("version", json!(1.0), "version is 1.0; this code reads version 1"),
        ("version", json!(true), "version is True; this code reads version 1"),
        ("alphabet", json!("ab"), "alphabet is 'ab'; expected 'abcdefghijklmnopqrstuvwxyz'"),
        ("normalization", json!(null), "normalization is None; expected 'minmax' or 'millivolt'"),
        ("normalization", json!("minmax"), "millivolt_range is [-2.5, 2]; expected null with normalization 'minmax'"),
        ("sampling_rate", json!("250"), "sampling_rate is '250'; expected a positive number or null"),
        ("sampling_rate", json!(0), "sampling_rate is 0; expected a positive number or null"),
        ("sampling_rate", json!(false), "sampling_rate is False; expected a positive number or null"),
        ("across_leads", json!(1), "across_leads is 1; expected true or false"),
        ("merges", json!({"a": []}), "merges is {'a': []}; expected a list of [string, id]"),
        ("merges", json!([["aa", 256], "bb"]), "merge 1 is 'bb'; expected [string, id]"),
        ("merges", json!([["aa", 256, 0]]), "merge 0 is ['aa', 256, 0]; expected [string, id]"),
        ("merges", json!([["aa", 256.0]]), "merge 0 is ['aa', 256.0]; expected [string, id]"),
        ("merges", json!([[256, "aa"]]), "merge 0 is [256, 'aa']; expected [string, id]"),
        ("merges", json!([["bb", 256], ["aa", 300]]), "merge 1 ('aa') has id 300; expected 257"),
        ("merges", json!([["aa", -1]]), "merge 0 ('aa') has id -1; expected 256"),
        ("merges", json!([["aB", 256]]), "merge 0 ('aB') holds 'B'; symbols are a to z"),
        ("merges", json!([["a\u{e9}", 256]]), "merge 0 ('a\u{e9}') holds '\u{e9}'; symbols are a to z"),
        ("merges", json!([["a", 256]]), "merge 0 ('a') has 1 symbol; expected at least 2"),
        ("merges", json!([["", 256]]), "merge 0 ('') has 0 symbols; expected at least 2"),
        ("merges", json!([["aa", 256], ["bb", 257], ["aa", 258]]), "merge 2 ('aa') is also merge 0"),
    ] {
        assert_eq!(error_with(key, value), message);
    }
    for (range, shown) in [
        (json!(null), "None"),
        (json!([1, 1]), "[1, 1]"),
        (json!([2, -2]), "[2, -2]"),
        (json!([0]), "[0]"),
        (json!([0, 1, 2]), "[0, 1, 2]"),
        (json!(["0", 1]), "['0', 1]"),
        (json!([0, true]), "[0, True]"),
        (json!([0, 1e300]), "[0, 1e+300]"),  // infinite in float32
        (json!([0, 1e-300]), "[0, 1e-300]"), // nothing in float32
    ] {
        let wanted = "expected two finite numbers, low < high, with normalization 'millivolt'";
        assert_eq!(error_with("millivolt_range", range), format!("millivolt_range is {shown}; {wanted}"));
    }
}

#[test]
fn the_constructor_checks_the_same() {
    let error = |merges: &[&str], range, rate| {
        let merges = merges.iter().map(|merge| merge.to_string()).collect();
        Tokenizer::new(merges, range, true, rate).unwrap_err().to_string()
    };
    assert_eq!(error(&["aa", "aa"], None, None), "merge 1 ('aa') is also merge 0");
    assert!(error(&[], Some((f64::NAN, 1.0)), None).starts_with("millivolt_range is (NaN, 1.0); expected two finite"));
    assert_eq!(error(&[], None, Some(-1.0)), "sampling_rate is -1.0; expected a positive number or null");
    assert!(error(&[], None, Some(f64::INFINITY)).starts_with("sampling_rate is inf"));
}

/// The rules of the format once more, as plainly as can be.
fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(content)) = serde_json::from_str(text) else { return false };
    let mut keys: Vec<&str> = content.keys().map(String::as_str).collect();
    keys.sort();
    if keys
        != [
            "across_leads",
            "alphabet",
            "format",
            "merges",
            "millivolt_range",
            "normalization",
            "sampling_rate",
            "version",
        ]
    {
        return false;
    }
    let range_is_valid = match (content["normalization"].as_str(), content["millivolt_range"].as_array()) {
        (Some("minmax"), None) => content["millivolt_range"].is_null(),
        (Some("millivolt"), Some(range)) => {
            let limits: Vec<f32> = range
                .iter()
                .filter_map(Value::as_f64)
                .map(|limit| limit as f32)
                .filter(|limit| limit.is_finite())
                .collect();
            range.len() == 2 && limits.len() == 2 && limits[0] < limits[1]
        }
        _ => false,
    };
    let Some(merges) = content["merges"].as_array() else { return false };
    let mut seen = HashSet::new();
    range_is_valid
        && content["format"] == "ecg_byte"
        && content["version"] == 1
        && content["alphabet"] == ALPHABET
        && content["across_leads"].is_boolean()
        && (content["sampling_rate"].is_null() || content["sampling_rate"].as_f64().is_some_and(|rate| rate > 0.0))
        && merges.iter().enumerate().all(|(number, merge)| {
            let Some(string) = merge[0].as_str() else { return false };
            merge.as_array().unwrap().len() == 2
                && merge[1] == 256 + number
                && string.len() > 1
                && string.bytes().all(|byte| byte.is_ascii_lowercase())
                && seen.insert(string)
        })
}

/// Any JSON, with a liking for what the format holds.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0..4i64).prop_map(Value::from),
        (255..260i64).prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
        "[a-z]{0,4}".prop_map(Value::from),
        prop::sample::select(vec!["minmax", "millivolt", "ecg_byte", ALPHABET]).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{0,4}", inner, 0..4)
                .prop_map(|members| Value::from(members.into_iter().collect::<serde_json::Map<_, _>>())),
        ]
    })
}

/// A valid file, in which some members were replaced, taken away or added.
fn nearly_valid() -> impl Strategy<Value = Value> {
    let changes = prop::collection::vec((any::<Index>(), any::<Index>(), any_json(), 0..6), 0..3);
    (prop::collection::hash_set("[a-c]{2,4}", 0..6), changes).prop_map(|(merges, changes)| {
        let mut content = example();
        content["merges"] = (256..).zip(merges).map(|(id, merge)| json!([merge, id])).collect();
        for (key, place, value, kind) in changes {
            let members = content.as_object_mut().unwrap();
            let keys: Vec<String> = members.keys().cloned().collect();
            let key = key.get(&keys).clone();
            match (kind, members.get_mut(&key)) {
                (0, _) => drop(members.remove(&key)),
                (1, _) => drop(members.insert(value.to_string(), value)),
                (2 | 3, Some(Value::Array(items))) if !items.is_empty() => {
                    let place = place.index(items.len());
                    match &mut items[place] {
                        Value::Array(entry) if kind == 2 && !entry.is_empty() => entry[0] = value,
                        item => *item = value,
                    }
                }
                _ => drop(members.insert(key, value)),
            }
            if members.is_empty() {
                break;
            }
        }
        content
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn loads_exactly_the_valid_files(content in nearly_valid()) {
        let text = content.to_string();
        let loaded = Tokenizer::from_json(&text);
        prop_assert_eq!(loaded.is_ok(), is_valid(&text), "{:?}", loaded.err());
    }

    #[test]
    fn a_truncated_file_is_not_valid_json(cut: Index) {
        let text = example().to_string();
        let message = error(&text[..cut.index(text.len())]);
        prop_assert!(message.starts_with("not valid JSON: "), "{}", message);
    }

    #[test]
    fn survives_damaged_bytes(
        content in nearly_valid(),
        splices in prop::collection::vec((any::<Index>(), 0..9usize, prop::collection::vec(any::<u8>(), 0..9)), 1..4),
    ) {
        let mut bytes = content.to_string().into_bytes();
        for (from, len, new) in splices {
            let from = from.index(bytes.len() + 1);
            let to = (from + len).min(bytes.len());
            bytes.splice(from..to, new);
        }
        let text = String::from_utf8_lossy(&bytes);
        prop_assert_eq!(Tokenizer::from_json(&text).is_ok(), is_valid(&text));
    }

    #[test]
    fn survives_any_text(text in any::<String>()) {
        prop_assert_eq!(Tokenizer::from_json(&text).is_ok(), is_valid(&text));
    }
}
