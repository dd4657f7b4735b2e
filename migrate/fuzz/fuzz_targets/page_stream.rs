//! A page stream on its way into memory: frames with right checksums, and in them whatever a peer may write.
#![no_main]

/// A directory of the engine, for the one file of it that is under test.
#[path = "../../src"]
mod engine {
    #[allow(dead_code, reason = "one end packs and the other unpacks")]
    pub mod codec;
}


/// As the receiver has it.
#[path = "../../src/inbound"]
mod inbound {
    pub mod decode;
    #[allow(dead_code, reason = "no link is taken up here")]
    pub mod parse;
    pub mod play;
}

/// What of the engine these files name.
mod error {
    pub(crate) type Result<T> = std::result::Result<T, protocol::ProtocolError>;
}

mod memory {
    use crate::error::Result;
    use protocol::page::{PageRun, SpaceId};

    #[allow(dead_code, reason = "one who reads a stream asks less than one who sends it")]
    pub(crate) trait PageReader {
        fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()>;
        fn is_untouched(&self, run: PageRun) -> Result<bool>;
    }
}

mod destination {
    use crate::error::Result;
    use crate::memory::PageReader;
    use protocol::page::{PageRun, SpaceId};

    pub(crate) trait PageMemory: PageReader {
        fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()>;
        fn zero(&self, run: PageRun) -> Result<()>;
        #[expect(dead_code, reason = "streams settle at the end of a round, and what is fuzzed is one frame after another")]
        fn settle(&self) -> Result<()>;
    }
}

use engine::codec;
use inbound::play::{framed, play};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // As it comes, which ends at the first checksum, and in frames whose sums are right.
    let _ = play(data);
    let _ = play(&framed(data));
});
