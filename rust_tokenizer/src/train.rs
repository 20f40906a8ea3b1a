//! Learning the merges: byte-pair encoding of the records' symbols.
//!
//! Counts of pairs are kept up to date while merging, and of every pair the places where it may stand, so that a merge
//! costs what it changes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::mem;
use std::ops::ControlFlow;

use crate::quantize::{NUM_SYMBOLS, Scale};
use crate::tokenizer::check_range;
use crate::{Ecg, Error};

/// Between records, and inside tokens of three symbols and more.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub num_merges: usize,
    pub millivolt_range: Option<(f64, f64)>,
    pub across_leads: bool,
    /// Pairs that are rarer are not merged.
    pub min_frequency: u32,
}

/// The merges in the order in which they were learnt: always the most frequent pair, of equals the one with the smallest ids.
///
/// The count of a pair is the number of its adjacent places, overlapping ones included; it is merged from the left. No two
/// pairs make the same string: what stands between two borders of tokens is split the same way everywhere, so the first
/// pair to make a string takes all its places, and a border is never put back.
///
/// `on_merge` is told the number of merges so far and the count of the last pair, and may end the training.
pub fn train(
    ecgs: &[Ecg],
    options: Options,
    mut on_merge: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<String>, Error> {
    let mut trainer = Trainer::new(read(ecgs, options)?);
    let mut heap: BinaryHeap<_> = trainer.pairs.iter().map(|(&pair, places)| (places.count, Reverse(pair))).collect();
    while trainer.num_merges() < options.num_merges
        && let Some((count, Reverse(pair))) = heap.pop()
    {
        // counts fall while their entries wait in the heap
        let current = trainer.pairs.get(&pair).map_or(0, |places| places.count);
        if current < options.min_frequency.max(1) {
            continue;
        }
        if current < count {
            heap.push((current, Reverse(pair)));
            continue;
        }
        heap.extend(trainer.merge(pair).into_iter().map(|pair| (trainer.pairs[&pair].count, Reverse(pair))));
        if on_merge(trainer.num_merges(), count).is_break() {
            break;
        }
    }
    Ok(trainer.strings.split_off(NUM_SYMBOLS))
}

/// The symbols of all records, `NONE` before, between and behind what pairs may not cross.
fn read(ecgs: &[Ecg], options: Options) -> Result<Vec<u32>, Error> {
    if let Some((low, high)) = options.millivolt_range {
        check_range(low, high, || format!("({low:?}, {high:?})"))?;
    }
    let range = options.millivolt_range.map(|(low, high)| (low as f32, high as f32));
    let mut tokens = vec![NONE];
    let mut symbols = Vec::new();
    for (number, ecg) in ecgs.iter().enumerate() {
        let scale = Scale::of(ecg.values, range).map_err(|error| Error(format!("record {number}: {error}")))?;
        let part = if options.across_leads { ecg.values.len() } else { ecg.samples };
        for values in ecg.values.chunks(part) {
            symbols.resize(values.len(), 0);
            scale.quantize(values, &mut symbols);
            tokens.extend(symbols.iter().copied().map(u32::from));
            tokens.push(NONE);
        }
    }
    if tokens.len() > NONE as usize {
        return Err(Error(format!("the records have {} samples; expected fewer than {NONE}", tokens.len())));
    }
    Ok(tokens)
}

type Pair = (u32, u32);

struct Places {
    /// How often the pair stands in the records now.
    count: u32,
    /// In increasing order: all its places, and some where it stood.
    positions: Vec<u32>,
}

/// What merging a pair takes from the pair of a neighbour and the old token, and gives that of the neighbour and the new.
#[derive(Clone, Default)]
struct Change {
    lost: u32,
    gained: Vec<u32>,
}

struct Trainer {
    /// A token's number at its first and its last symbol: 0 to 25 are the symbols, 26 and up the merges.
    tokens: Vec<u32>,
    strings: Vec<String>,
    pairs: HashMap<Pair, Places>,
    /// By the neighbour's number; empty between merges.
    before: Vec<Change>,
    after: Vec<Change>,
}

impl Trainer {
    fn new(tokens: Vec<u32>) -> Trainer {
        let pairs_in_place = || {
            let is_pair = |pair: &[u32]| pair[0] != NONE && pair[1] != NONE;
            (0..).zip(tokens.windows(2)).filter(move |(_, pair)| is_pair(pair))
        };
        let mut counts = [[0; NUM_SYMBOLS]; NUM_SYMBOLS];
        for (_, pair) in pairs_in_place() {
            counts[pair[0] as usize][pair[1] as usize] += 1;
        }
        let mut positions = counts.map(|row| row.map(Vec::with_capacity)); // without room for more
        for (position, pair) in pairs_in_place() {
            positions[pair[0] as usize][pair[1] as usize].push(position);
        }
        let mut pairs = HashMap::new();
        for (left, row) in (0..).zip(positions) {
            for (right, positions) in (0..).zip(row) {
                let count = positions.len() as u32;
                pairs.insert((left, right), Places { count, positions });
            }
        }
        Trainer {
            tokens,
            strings: ('a'..='z').map(String::from).collect(),
            pairs,
            before: vec![Change::default(); NUM_SYMBOLS],
            after: vec![Change::default(); NUM_SYMBOLS],
        }
    }

    fn num_merges(&self) -> usize {
        self.strings.len() - NUM_SYMBOLS
    }

    /// Merges a pair wherever it stands; returns the pairs with the new token.
    fn merge(&mut self, pair: Pair) -> Vec<Pair> {
        let (left, right) = pair;
        let merged = self.strings.len() as u32;
        self.strings.push(self.strings[left as usize].clone() + &self.strings[right as usize]);
        self.before.push(Change::default());
        self.after.push(Change::default());

        let left_len = self.strings[left as usize].len();
        let right_len = self.strings[right as usize].len();
        for position in self.pairs.remove(&pair).map_or(Vec::new(), |places| places.positions) {
            let start = position as usize;
            let middle = start + left_len;
            if self.tokens[start] != left || self.tokens[middle] != right {
                continue;
            }
            let end = middle + right_len;
            let (before, after) = (self.tokens[start - 1], self.tokens[end]);
            if before != NONE {
                let change = &mut self.before[before as usize];
                change.lost += 1;
                change.gained.push(position - self.strings[before as usize].len() as u32);
            }
            if after != NONE {
                let change = &mut self.after[after as usize];
                change.lost += 1;
                change.gained.push(position);
            }
            // no symbol inside may look like the place of a pair
            self.tokens[middle - 1] = NONE;
            self.tokens[middle] = NONE;
            self.tokens[start] = merged;
            self.tokens[end - 1] = merged;
        }

        let mut lost = Vec::new();
        let mut gained = Vec::new();
        let mut apply = |old: Pair, new: Pair, change: &mut Change| {
            if change.lost > 0 {
                lost.push((old, change.lost));
                gained.push(new);
                let positions = mem::take(&mut change.gained);
                self.pairs.insert(new, Places { count: positions.len() as u32, positions });
                change.lost = 0;
            }
        };
        for (before, change) in (0..).zip(&mut self.before) {
            apply((before, left), (before, merged), change);
        }
        for (after, change) in (0..).zip(&mut self.after) {
            apply((right, after), (merged, after), change);
        }
        // last, as the next place may take what the one before has given
        for (pair, lost) in lost {
            if let Some(places) = self.pairs.get_mut(&pair) {
                places.count -= lost;
                if places.count == 0 {
                    self.pairs.remove(&pair);
                }
            }
        }
        gained.retain(|pair| self.pairs.contains_key(pair));
        gained
    }
}
