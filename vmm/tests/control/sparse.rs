//! Sparse page sets are for who can read them, and say the same as the plain ones.

use super::{LIMIT, MEMORY, Running, kvm, test_images};
use protocol::{
    envelope::{self, HEADER_BYTES, Header},
    layout::Layout,
    monitor::{MAX_BLOB_BYTES, Reply, Request, Role, VERSION},
    page::PageSet,
    sparse,
};
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

/// A client that says just what it is told.
struct Raw(UnixStream);

impl Raw {
    fn session(vm: &Running) -> Self {
        let stream = UnixStream::connect(&vm.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut raw = Self(stream);
        raw.ask(&Request::Hello { version: VERSION, role: Role::Session, client: "test".into() });
        raw
    }

    fn ask(&mut self, request: &Request) -> (Reply, Vec<u8>) {
        self.0.write_all(&envelope::encode(request, &[]).unwrap()).unwrap();
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::decode(&header, MAX_BLOB_BYTES).unwrap();
        let mut json = vec![0; header.json_bytes as usize];
        let mut blob = vec![0; header.blob_bytes as usize];
        self.0.read_exact(&mut json).unwrap();
        self.0.read_exact(&mut blob).unwrap();
        (envelope::decode("reply", &json).unwrap(), blob)
    }

    fn plain(&mut self) -> (u64, PageSet) {
        let (reply, blob) = self.ask(&Request::Harvest { sparse: false });
        let Reply::Dirty { pages, sparse: false } = reply else { panic!("{reply:?}") };
        (pages, PageSet::from_bytes(MEMORY / 4096, &blob).unwrap())
    }

    fn sparse(&mut self, layout: &Layout) -> (u64, PageSet, usize) {
        let (reply, blob) = self.ask(&Request::Harvest { sparse: true });
        let Reply::Dirty { pages, sparse: true } = reply else { panic!("{reply:?}") };
        (pages, sparse::decode(layout, &blob).unwrap().remove(0), blob.len())
    }
}

#[test]
fn a_harvest_is_sparse_where_that_is_shorter_and_only_for_who_asks_for_it() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    let layout = vm.session().describe().unwrap().layout;
    let mut raw = Raw::session(&vm);
    raw.ask(&Request::TrackStart { keep: false });
    // Everything is dirty: the plain set is the shorter one, and a client gets it though it could read the other.
    let (reply, blob) = raw.ask(&Request::Harvest { sparse: true });
    let all = MEMORY / 4096;
    assert_eq!(reply, Reply::Dirty { pages: all, sparse: false });
    assert_eq!(PageSet::from_bytes(all, &blob).unwrap(), PageSet::full(all));

    // The guest stands still, so that one harvest is as the next.
    raw.ask(&Request::Freeze);
    raw.plain();
    raw.ask(&Request::Take { space: 0, first: 0, count: 2000 });
    raw.ask(&Request::Take { space: 0, first: 2003, count: all - 2003 });
    let (pages, plain) = raw.plain();
    let (also_pages, sparse, bytes) = raw.sparse(&layout);
    assert_eq!((pages, plain.count()), (3, 3));
    assert_eq!((also_pages, &sparse), (pages, &plain));
    assert!(bytes < 64, "{bytes} bytes for three pages");
    raw.ask(&Request::Take { space: 0, first: 0, count: all });
    assert_eq!(raw.sparse(&layout), (0, PageSet::empty(all), 0));
    drop(raw);
    vm.terminate();
}
