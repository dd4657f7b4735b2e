//! What a page holds: a 64-byte header and 4032 bytes derived from it.
//!
//! | word | header |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | page number |
//! | 2 | version, in the low 32 bits |
//! | 3 | the iteration that wrote it; [`FILLED`] if it was the fill at boot |
//! | 4 | seed |
//! | 5, 6 | 0 |
//! | 7 | checksum of all other words |
//!
//! Words are little-endian `u64`. With [`Content::Zero`] every odd version (so also what the fill at boot
//! writes) is a page of zeros without a header: only the version table tells it from an empty page.

use super::layout::PAGE_SIZE;
use super::pattern::{ROOT_2, ROOT_3, ROOT_5, fold, mix};

/// Words in a page.
pub const WORDS: usize = (PAGE_SIZE / 8) as usize;

/// A page as words.
pub type Page = [u64; WORDS];

/// Word 0 of every page that has a header: "LDGRPAGE" in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"LDGRPAGE");

/// The iteration of a page written by the fill at boot.
pub const FILLED: u64 = u64::MAX;

/// The version the fill at boot gives to every page; each iteration adds 1 to its page's.
pub const FIRST_VERSION: u32 = 1;

/// Words handled at once, each in a lane of its own so that the multiplications overlap.
const LANES: usize = 8;

const CHECKSUM: usize = 7;

/// What fills the page behind its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes that no compressor makes smaller.
    Random,
    /// Words in a made-up language: general compressors make it about three times smaller.
    Text,
    /// Zeros; every odd version has not even a header.
    Zero,
}

impl Content {
    /// The content called `name` on the command line.
    pub fn from_name(name: &str) -> Option<Content> {
        [Content::Random, Content::Text, Content::Zero].into_iter().find(|content| content.name() == name)
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Content::Random => "random",
            Content::Text => "text",
            Content::Zero => "zero",
        }
    }

    /// Whether a page of this version is zero from its first byte to its last.
    pub fn is_blank(self, version: u32) -> bool {
        self == Content::Zero && version % 2 == 1
    }
}

/// What makes a page what it is: two pages with the same identity are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The run's seed.
    pub seed: u64,
    /// The page's number.
    pub page: u64,
    /// How often it was written, the fill counted.
    pub version: u32,
    /// The iteration that wrote it, or [`FILLED`].
    pub iteration: u64,
    /// What fills it.
    pub content: Content,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Damage {
    /// It is all zeros but should not be: it never arrived.
    Lost,
    /// It is whole, but another version than expected (or its version-table entry is the old one).
    Stale,
    /// Its checksum does not fit: a mixture of versions, or a flipped bit.
    Torn,
    /// It is not this page: no header, or another page's, or another run's.
    Foreign,
}

impl Damage {
    /// The word used on the serial line.
    pub fn name(self) -> &'static str {
        match self {
            Damage::Lost => "lost",
            Damage::Stale => "stale",
            Damage::Torn => "torn",
            Damage::Foreign => "foreign",
        }
    }
}

/// Eight running checksums, one for each word of a 64-byte line.
struct Lanes([u64; LANES]);

impl Lanes {
    fn new() -> Self {
        let mut lanes = [ROOT_2; LANES];
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane = lane.rotate_left(i as u32 * 7);
        }
        Lanes(lanes)
    }

    /// One multiplication a word. Each step is a bijection of the lane, so that a change of a single word
    /// always changes the checksum.
    #[inline(always)]
    fn add(&mut self, line: &[u64; LANES]) {
        for (lane, word) in self.0.iter_mut().zip(line) {
            *lane = (*lane ^ word).rotate_left(29).wrapping_mul(ROOT_3);
        }
    }

    fn finish(self) -> u64 {
        self.0.iter().fold(ROOT_5, |sum, lane| (sum ^ lane).rotate_left(31).wrapping_mul(ROOT_2))
    }
}

/// The checksum a page should carry: of all its words but the checksum itself.
pub fn checksum(page: &Page) -> u64 {
    let (lines, _) = page.as_chunks::<LANES>();
    let mut lanes = Lanes::new();
    for (i, line) in lines.iter().enumerate() {
        if i == 0 {
            let mut header = *line;
            header[CHECKSUM] = 0;
            lanes.add(&header);
        } else {
            lanes.add(line);
        }
    }
    lanes.finish()
}

/// Makes `page` the page of this identity.
///
/// Each word is stored once, the header's last, so that an interrupted write leaves words that are each
/// either the old one or the new one.
pub fn write(page: &mut Page, id: &Identity) {
    if id.content.is_blank(id.version) {
        page.fill(0);
        return;
    }
    let (lines, _) = page.as_chunks_mut::<LANES>();
    let Some((header, body)) = lines.split_first_mut() else { return };
    let mut new = [MAGIC, id.page, u64::from(id.version), id.iteration, id.seed, 0, 0, 0];
    let mut lanes = Lanes::new();
    lanes.add(&new);
    let base = mix(mix(id.seed, id.page), u64::from(id.version));
    match id.content {
        Content::Random => {
            for (i, line) in body.iter_mut().enumerate() {
                let fresh = random_line(base, i as u64);
                lanes.add(&fresh);
                *line = fresh;
            }
        }
        Content::Text => {
            for (i, line) in body.iter_mut().enumerate() {
                let fresh = text_line(base, i as u64);
                lanes.add(&fresh);
                *line = fresh;
            }
        }
        Content::Zero => {
            for line in body.iter_mut() {
                lanes.add(&[0; LANES]);
                *line = [0; LANES];
            }
        }
    }
    new[CHECKSUM] = lanes.finish();
    *header = new;
}

#[inline(always)]
fn random_line(base: u64, line: u64) -> [u64; LANES] {
    let mut words = [0; LANES];
    for (i, word) in words.iter_mut().enumerate() {
        let counter = base.wrapping_add((line * LANES as u64 + i as u64).wrapping_mul(ROOT_3));
        *word = fold(counter ^ ROOT_5, counter | 1);
    }
    words
}

/// Eight cells of eight bytes: a byte of the draw picks each one's word.
#[inline(always)]
fn text_line(base: u64, line: u64) -> [u64; LANES] {
    let draw = mix(base, line).to_le_bytes();
    let mut words = [0; LANES];
    for (word, pick) in words.iter_mut().zip(draw) {
        *word = VOCABULARY[usize::from(pick)];
    }
    words
}

/// 256 cells of eight bytes; common words stand in many of them, as in a language.
static VOCABULARY: [u64; 256] = vocabulary();

/// Syllables that the words are made of.
const SYLLABLES: &[u8; 64] = b"rolamitesunovadikeparulobetigosemafinurecodalihopesitumavegonaki";

/// How many different words there are.
const DISTINCT: usize = 56;

const fn vocabulary() -> [u64; 256] {
    let mut cells = [0; 256];
    let mut i = 0;
    while i < 256 {
        // The square makes low ranks common: rank 0 gets about 26 cells, the last ranks one or two.
        let rank = i * i * DISTINCT / (256 * 256);
        let mut cell = [b' '; 8];
        let letters = 3 + (rank * 7) % 5;
        let mut letter = 0;
        while letter < letters {
            let syllable = (rank * 5 + (letter / 2) * (rank + 11)) % 32;
            cell[letter] = SYLLABLES[syllable * 2 + letter % 2];
            letter += 1;
        }
        cells[i] = u64::from_le_bytes(cell);
        i += 1;
    }
    cells
}

/// Checks a page by what it says of itself: is it the expected version of page `page`, and whole?
///
/// Gives the damage and the version its header claims (0 if it has none).
pub fn check(
    page: &Page,
    number: u64,
    version: u32,
    seed: u64,
    content: Content,
) -> Result<(), (Damage, u32)> {
    let header = [page[0], page[1], page[4]];
    let claimed = page[2];
    if !content.is_blank(version) {
        let intact = checksum(page) == page[CHECKSUM];
        if intact && header == [MAGIC, number, seed] && claimed == u64::from(version) {
            return Ok(());
        }
    }
    let blank = page.iter().all(|word| *word == 0);
    if blank && content.is_blank(version) {
        return Ok(());
    }
    if blank {
        return Err((Damage::Lost, 0));
    }
    if page[..LANES] == [0; LANES] {
        // A header of zeros before something: part of a page that was blank, or never arrived whole.
        return Err((Damage::Torn, 0));
    }
    let found = u32::try_from(claimed).unwrap_or(0);
    if header != [MAGIC, number, seed] {
        return Err((Damage::Foreign, 0));
    }
    if checksum(page) != page[CHECKSUM] { Err((Damage::Torn, found)) } else { Err((Damage::Stale, found)) }
}
