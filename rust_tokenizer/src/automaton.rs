//! Greedy longest match over the token strings, and back.
//!
//! The trie of the strings is cut into chunks of up to 16 symbols that are compared at once. A chunk goes on past the
//! branches on its way, towards the most tokens; a branch begins a chunk of its own. So a token of a dozen symbols takes
//! two or three steps, and a step has no jump to mispredict. As its loads still wait for each other, several parts of
//! the string are parsed in turn, and joined where a token of one ends at the beginning of a token of the next.

use std::array;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::hint::select_unpredictable as select;
use std::mem;
use std::ops::Range;

use multiversion::multiversion;

use crate::Error;
use crate::quantize::NUM_SYMBOLS;

/// The id of symbol a, its byte.
const FIRST_SYMBOL_ID: u32 = b'a' as u32;
/// The id of the first merge.
pub const FIRST_MERGE_ID: u32 = 256;

/// Stands behind the last symbol, as a token by itself.
const END: u8 = 31;
const END_ID: u32 = 0;
/// Fills the rest of a label, and matches nothing.
const NO_SYMBOL: u8 = 0xFF;

/// Symbols compared in one step.
const CHUNK: usize = 16;
/// Above any two symbols, each in its byte.
const START: usize = (END as usize + 1) << 8;
/// Parts parsed in turn.
const LANES: usize = 4;
/// Steps of each lane between two looks at how far they are.
const ROUND: usize = 16;
/// Shorter rests are not shared out.
const MIN_SEGMENT: usize = 256;
/// Symbols behind the string: a round may end that far behind it, and reads a whole chunk and one more.
pub const PADDING: usize = ROUND + CHUNK + 1;
/// Values decoded at once.
const BLOCK: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// Its symbols, the first in the lowest byte.
    label: u128,
    /// Bit i is set where a token ends with symbol i.
    ends: u32,
    /// The place in `Automaton::ids` before that of the first of these tokens.
    place: u32,
    /// Its row in `Automaton::slots`.
    row: u32,
}

/// A way on from a chunk, at `row + Branch::column` of the chunk that is its parent.
#[derive(Clone, Copy, Debug)]
struct Slot {
    parent: u32,
    child: u32,
}

const FREE: Slot = Slot { parent: u32::MAX, child: 0 };

#[derive(Clone, Debug)]
pub struct Automaton {
    /// First those that begin a token, then those that go on with one.
    chunks: Vec<Chunk>,
    num_first: u32,
    /// The first chunk, by the first two symbols of the token.
    start: Box<[u32; START]>,
    slots: Vec<Slot>,
    ids: Vec<u32>,
    /// By id: where its symbols are in `fractions`, and how many; none for ids that are no tokens.
    spans: Vec<(usize, usize)>,
    /// All tokens' symbols, each as its number / 25, and a block to read over.
    fractions: Vec<f32>,
}

/// A parse of a string.
#[derive(Clone, Copy, Debug)]
struct Parse {
    position: usize,
    chunk: u32,
    /// Where the longest match so far ends, and the place of its id.
    end: usize,
    place: u32,
}

/// The part from `start` to `limit`, and what its parse has found, which may reach beyond.
struct Segment {
    start: usize,
    limit: usize,
    parse: Parse,
    ids: Vec<u32>,
}

impl Segment {
    fn rest(&self) -> usize {
        self.limit.saturating_sub(self.parse.position)
    }
}

impl Automaton {
    /// `merges[i]` holds the symbols, 0 to 25, of the token with id 256 + i: at least two, and no two merges alike.
    pub fn new(merges: &[Vec<u8>]) -> Automaton {
        let mut spans = vec![(0, 0); FIRST_MERGE_ID as usize];
        let fraction = |symbol: u8| f32::from(symbol) / (NUM_SYMBOLS - 1) as f32;
        let mut fractions: Vec<f32> = (0..NUM_SYMBOLS as u8).map(fraction).collect();
        for symbol in 0..NUM_SYMBOLS {
            spans[FIRST_SYMBOL_ID as usize + symbol] = (symbol, 1);
        }
        for merge in merges {
            spans.push((fractions.len(), merge.len()));
            fractions.extend(merge.iter().map(|&symbol| fraction(symbol)));
        }
        fractions.extend([0.0; BLOCK]);

        let mut builder = Builder::new(merges);
        let start = builder.first_chunks();
        let num_first = builder.chunks.len() as u32;
        builder.other_chunks();
        let slots = builder.place_branches();
        let Builder { chunks, ids, .. } = builder;
        Automaton { chunks, num_first, start, slots, ids, spans, fractions }
    }

    /// Appends the ids of a string of symbols, 0 to 25.
    pub fn encode(&self, symbols: &mut Vec<u8>, ids: &mut Vec<u32>) {
        let len = symbols.len();
        symbols.resize(len + PADDING, END);
        encode(self, symbols, len, ids);
        symbols.truncate(len);
    }

    /// The values of the tokens' symbols: number / 25 * (high - low) + low.
    pub fn decode(&self, ids: &[u32], low: f32, high: f32) -> Result<Vec<f32>, Error> {
        let mut spans = Vec::with_capacity(ids.len());
        let mut len = 0;
        for (place, &id) in ids.iter().enumerate() {
            let span = self.spans.get(id as usize).copied().unwrap_or_default();
            if span.1 == 0 {
                let last = self.spans.len() - 1;
                return Err(Error(format!("id {id} at {place} is no token; the last is {last}")));
            }
            spans.push(span);
            len += span.1;
        }
        let mut values = vec![0.0; len + BLOCK];
        fill(&spans, &self.fractions, low, high - low, &mut values);
        values.truncate(len);
        Ok(values)
    }

    /// A parse with the beginning of a token at `position`.
    #[inline(always)]
    fn parse_from(&self, symbols: &[u8], position: usize) -> Parse {
        let two = u16::from_le_bytes([symbols[position], symbols[position + 1]]) as usize;
        Parse { position, chunk: self.start[two % START], end: position, place: 0 }
    }

    /// Compares one chunk; returns the place of the id of the longest match so far, and whether it is the token.
    #[inline(always)]
    fn step(&self, symbols: &[u8], parse: &mut Parse) -> (u32, bool) {
        let position = parse.position;
        let chunk = &self.chunks[parse.chunk as usize];
        let window: &[u8; CHUNK + 1] = symbols[position..position + CHUNK + 1].try_into().unwrap();
        let compared = u128::from_le_bytes(*window.first_chunk().unwrap());
        let matched = (compared ^ chunk.label).trailing_zeros() as usize / 8;
        let ends = chunk.ends & ((1 << matched) - 1);
        let end = select(ends != 0, position + (u32::BITS - ends.leading_zeros()) as usize, parse.end);
        let place = select(ends != 0, chunk.place + ends.count_ones(), parse.place);
        let slot = self.slots[chunk.row as usize + column(matched, window[matched])];
        let goes_on = slot.parent == parse.chunk;
        let next = self.parse_from(symbols, end);
        *parse = Parse {
            position: select(goes_on, position + matched, end),
            chunk: select(goes_on, slot.child, next.chunk),
            end,
            place,
        };
        (place, !goes_on)
    }

    /// Finishes the token at hand.
    #[inline(always)]
    fn next_token(&self, symbols: &[u8], parse: &mut Parse) -> u32 {
        loop {
            if let (place, true) = self.step(symbols, parse) {
                return self.ids[place as usize];
            }
        }
    }
}

/// Which slot of its row a chunk goes on by after `matched` symbols.
#[inline(always)]
fn column(matched: usize, symbol: u8) -> usize {
    matched << 5 | symbol as usize
}

/// Appends the ids of `symbols[..len]`; behind these stand `PADDING` ends.
#[multiversion(targets("x86_64+bmi1+bmi2+lzcnt+popcnt"))]
fn encode(automaton: &Automaton, symbols: &[u8], len: usize, ids: &mut Vec<u32>) {
    let segment = |start, limit| Segment { start, limit, parse: automaton.parse_from(symbols, start), ids: Vec::new() };
    let mut lanes: [Segment; LANES] = array::from_fn(|lane| segment(if lane == 0 { 0 } else { len }, len));
    let mut segments = Vec::new();
    'rounds: loop {
        // a lane at its limit takes over half of the longest rest
        for lane in 0..LANES {
            if lanes[lane].rest() == 0 {
                let busiest = (0..LANES).max_by_key(|&lane| lanes[lane].rest()).unwrap();
                let (limit, rest) = (lanes[busiest].limit, lanes[busiest].rest());
                if rest < MIN_SEGMENT {
                    break 'rounds;
                }
                lanes[busiest].limit = limit - rest / 2;
                segments.push(mem::replace(&mut lanes[lane], segment(limit - rest / 2, limit)));
            }
        }
        let mut parses = lanes.each_ref().map(|lane| lane.parse);
        let mut places = [[0; ROUND]; LANES];
        let mut counts = [0; LANES];
        for _ in 0..ROUND {
            for lane in 0..LANES {
                let (place, done) = automaton.step(symbols, &mut parses[lane]);
                places[lane][counts[lane] % ROUND] = place;
                counts[lane] += usize::from(done);
            }
        }
        for lane in 0..LANES {
            lanes[lane].parse = parses[lane];
            lanes[lane].ids.extend(places[lane][..counts[lane]].iter().map(|&place| automaton.ids[place as usize]));
        }
    }
    segments.extend(lanes);
    segments.sort_by_key(|segment| segment.start);

    let mut parse = automaton.parse_from(symbols, 0);
    for mut segment in segments {
        // stopped inside a token
        if segment.parse.chunk >= automaton.num_first {
            segment.ids.push(automaton.next_token(symbols, &mut segment.parse));
        }
        // on with the parse so far, until it comes to where a token of this part begins; in a run it may never come
        let mut position = segment.start;
        let mut known = segment.ids.iter();
        while position != parse.position {
            if position > parse.position {
                ids.push(automaton.next_token(symbols, &mut parse));
            } else if let Some(&id) = known.next() {
                position += automaton.spans[id as usize].1;
            } else {
                break;
            }
        }
        if position == parse.position {
            ids.extend(known);
            parse = segment.parse;
        }
    }
    while parse.position < len {
        ids.push(automaton.next_token(symbols, &mut parse));
    }
    while ids.last() == Some(&END_ID) {
        ids.pop();
    }
}

/// Writes whole blocks, of which the next token overwrites what is too much.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn fill(spans: &[(usize, usize)], fractions: &[f32], low: f32, width: f32, values: &mut [f32]) {
    let mut position = 0;
    for &(start, len) in spans {
        for offset in (0..len).step_by(BLOCK) {
            let from = &fractions[start + offset..start + offset + BLOCK];
            let to = &mut values[position + offset..position + offset + BLOCK];
            for (value, fraction) in to.iter_mut().zip(from) {
                *value = fraction * width + low;
            }
        }
        position += len;
    }
}

/// The way on from a chunk after `matched` symbols of it, by `symbol`.
struct Branch {
    matched: usize,
    symbol: u8,
    child: u32,
}

impl Branch {
    fn column(&self) -> usize {
        column(self.matched, self.symbol)
    }
}

/// A branch whose chunk is still to be made, of tokens that begin with the same `depth` symbols and the branch's.
struct Pending {
    chunk: usize,
    branch: usize,
    tokens: Range<usize>,
    depth: usize,
}

struct Builder<'a> {
    /// Symbols and ids of the merges, sorted, so that those with a common beginning are a range.
    tokens: Vec<(&'a [u8], u32)>,
    chunks: Vec<Chunk>,
    ids: Vec<u32>,
    /// Of each chunk, by column.
    branches: Vec<Vec<Branch>>,
    pending: VecDeque<Pending>,
}

impl<'a> Builder<'a> {
    fn new(merges: &'a [Vec<u8>]) -> Builder<'a> {
        let mut tokens: Vec<_> = merges.iter().map(Vec::as_slice).zip(FIRST_MERGE_ID..).collect();
        tokens.sort_unstable();
        Builder { tokens, chunks: Vec::new(), ids: vec![END_ID], branches: Vec::new(), pending: VecDeque::new() }
    }

    /// Makes the chunks that begin a token, for each two symbols that there are merges with.
    fn first_chunks(&mut self) -> Box<[u32; START]> {
        let end = self.add_chunk(Some((END, END_ID)), 0..0, 0);
        let mut start = Box::new([end; START]);
        for first in 0..NUM_SYMBOLS as u8 {
            let single = Some((first, FIRST_SYMBOL_ID + u32::from(first)));
            let alone = self.add_chunk(single, 0..0, 0);
            for second in 0..=END {
                let prefix = [first, second];
                let from = self.tokens.partition_point(|token| token.0 < prefix.as_slice());
                let count = self.tokens[from..].partition_point(|token| token.0.starts_with(&prefix));
                let both = u16::from_le_bytes(prefix) as usize;
                start[both] = if count == 0 { alone } else { self.add_chunk(single, from..from + count, 0) };
            }
        }
        start
    }

    fn other_chunks(&mut self) {
        while let Some(Pending { chunk, branch, tokens, depth }) = self.pending.pop_front() {
            self.branches[chunk][branch].child = self.add_chunk(None, tokens, depth);
        }
    }

    /// Makes the chunk that begins with symbol `depth` of `tokens`, or with `single`, a token of one symbol.
    fn add_chunk(&mut self, single: Option<(u8, u32)>, mut tokens: Range<usize>, depth: usize) -> u32 {
        let number = self.chunks.len();
        let mut label = [NO_SYMBOL; CHUNK];
        let mut chunk = Chunk { label: 0, ends: 0, place: self.ids.len() as u32 - 1, row: 0 };
        let mut branches = Vec::new();
        if let Some((symbol, id)) = single {
            label[0] = symbol;
            chunk.ends = 1;
            self.ids.push(id);
        }
        for matched in 0..=CHUNK {
            let groups = self.split(tokens, depth + matched);
            let Some(largest) = groups.iter().map(|group| group.1.clone()).max_by_key(Range::len) else {
                break;
            };
            for (symbol, tokens) in groups {
                match label.get_mut(matched) {
                    Some(next) if tokens == largest => *next = symbol,
                    _ => {
                        self.pending.push_back(Pending {
                            chunk: number,
                            branch: branches.len(),
                            tokens,
                            depth: depth + matched,
                        });
                        branches.push(Branch { matched, symbol, child: 0 });
                    }
                }
            }
            let (symbols, id) = self.tokens[largest.start];
            if matched < CHUNK && symbols.len() == depth + matched + 1 {
                chunk.ends |= 1 << matched;
                self.ids.push(id);
            }
            tokens = largest;
        }
        chunk.label = u128::from_le_bytes(label);
        self.chunks.push(chunk);
        self.branches.push(branches);
        number as u32
    }

    /// Splits tokens with `depth` symbols in common by their next symbol.
    fn split(&self, mut tokens: Range<usize>, depth: usize) -> Vec<(u8, Range<usize>)> {
        // the one that has no next symbol comes first
        if !tokens.is_empty() && self.tokens[tokens.start].0.len() == depth {
            tokens.start += 1;
        }
        let mut groups = Vec::new();
        while !tokens.is_empty() {
            let symbol = self.tokens[tokens.start].0[depth];
            let count = self.tokens[tokens.clone()].partition_point(|token| token.0[depth] == symbol);
            groups.push((symbol, tokens.start..tokens.start + count));
            tokens.start += count;
        }
        groups
    }

    /// Lays the chunks' rows over each other, the fullest first, each where it meets only free slots.
    fn place_branches(&mut self) -> Vec<Slot> {
        let row_len = column(CHUNK, END) + 1;
        let mut slots = vec![FREE; 2 * row_len];
        let mut first_free = row_len;
        let mut order: Vec<usize> = (0..self.chunks.len()).filter(|&chunk| !self.branches[chunk].is_empty()).collect();
        order.sort_by_key(|&chunk| Reverse(self.branches[chunk].len()));
        for chunk in order {
            let branches = &self.branches[chunk];
            while slots[first_free].parent != FREE.parent {
                first_free += 1;
            }
            let mut row = first_free - branches[0].column();
            while branches.iter().any(|branch| slots[row + branch.column()].parent != FREE.parent) {
                row += 1;
                slots.resize(slots.len().max(row + 2 * row_len), FREE);
            }
            for branch in branches {
                slots[row + branch.column()] = Slot { parent: chunk as u32, child: branch.child };
            }
            slots.resize(slots.len().max(row + 2 * row_len), FREE);
            self.chunks[chunk].row = row as u32;
        }
        slots
    }
}
