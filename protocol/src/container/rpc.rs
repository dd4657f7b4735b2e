//! What runc and CRIU say to each other, as far as somebody between them has to understand it.
//!
//! Both talk over a socket that keeps messages apart: runc asks once (`criu_req`), and CRIU answers any number of times (`criu_resp`). An
//! answer of the type `NOTIFY` says how far it has come, and CRIU goes on when runc has acknowledged it. (images/rpc.proto of CRIU 3.17 to
//! 4.2.)

use prost::Message;

/// Everything is made anew, nothing of it has run, and no connection has said anything: what follows is that it does (`restore_root_task` in
/// criu/cr-restore.c).
pub const POST_RESTORE: &str = "post-restore";

/// `RESTORE` and `NOTIFY` of `criu_req_type`.
const RESTORE: i32 = 2;
const NOTIFY: i32 = 6;

#[derive(Clone, PartialEq, Eq, Message)]
struct RequestMessage {
    #[prost(int32, required, tag = "1")]
    kind: i32,
}

/// What is put behind a request: of what is there twice the last is meant, and parts of a message are put together.
#[derive(Clone, PartialEq, Eq, Message)]
struct PlaceMessage {
    #[prost(message, required, tag = "2")]
    options: OptionsMessage,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct OptionsMessage {
    #[prost(int32, required, tag = "1")]
    images_dir_fd: i32,
    #[prost(int32, required, tag = "17")]
    work_dir_fd: i32,
    #[prost(message, repeated, tag = "25")]
    cg_root: Vec<CgroupMessage>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct CgroupMessage {
    #[prost(string, required, tag = "2")]
    path: String,
}

/// What somebody between the two has to add to a request for making something anew.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// A descriptor behind which the images are. CRIU looks for it in the process that made its socket (`setup_opts_from_req` in
    /// criu/cr-service.c).
    pub images: i32,
    /// One of the directory for logs and sockets.
    pub work: i32,
    /// The control group that runc made, where there is one hierarchy for all controllers. Of that it does not tell CRIU, which would go by the name
    /// that the group had (`criuApplyCgroups` in runc's libcontainer).
    pub cgroup: Option<&'a str>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct AnswerMessage {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "5")]
    notify: Option<NotifyMessage>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct NotifyMessage {
    #[prost(string, optional, tag = "1")]
    script: Option<String>,
}

/// Whether this asks CRIU to make something anew.
pub fn asks_to_restore(message: &[u8]) -> bool {
    RequestMessage::decode(message).is_ok_and(|request| request.kind == RESTORE)
}

impl Place<'_> {
    /// Adds it behind a request: of what is there twice, the last is meant.
    pub fn add(&self, message: &mut Vec<u8>) {
        let cg_root = self.cgroup.iter().map(|path| CgroupMessage { path: (*path).into() }).collect();
        let options = OptionsMessage { images_dir_fd: self.images, work_dir_fd: self.work, cg_root };
        message.extend(PlaceMessage { options }.encode_to_vec());
    }
}

/// How far CRIU says that it has come, if that is what a message of its says.
pub fn notification(message: &[u8]) -> Option<String> {
    let answer = AnswerMessage::decode(message).ok()?;
    answer.notify.filter(|_| answer.kind == NOTIFY)?.script
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_notification_is_told_from_other_answers() {
        // type: NOTIFY, success: true, notify { script, pid: 7 }
        let said = |kind: u8| [&[8, kind, 16, 1, 42, 16, 10, 12][..], b"post-restore", &[16, 7]].concat();
        assert_eq!(notification(&said(6)).as_deref(), Some(POST_RESTORE));
        assert_eq!(notification(&said(2)), None);
        // type: RESTORE, success: true, restore { pid: 7 }
        assert_eq!(notification(&[8, 2, 16, 1, 34, 2, 8, 7]), None);
        assert_eq!(notification(b""), None);
    }

    #[test]
    fn the_last_place_is_meant() {
        // type: RESTORE, opts { images_dir_fd: 5, pid: 9, work_dir_fd: 6 }
        let mut request = vec![8, 2, 18, 7, 8, 5, 16, 9, 136, 1, 6];
        assert!(asks_to_restore(&request) && !asks_to_restore(&[8, 1]) && !asks_to_restore(b""));
        Place { images: 300, work: 400, cgroup: Some("/web") }.add(&mut request);
        assert!(asks_to_restore(&request));
        let options = PlaceMessage::decode(&request[..]).unwrap().options;
        let cg_root = vec![CgroupMessage { path: "/web".into() }];
        assert_eq!(options, OptionsMessage { images_dir_fd: 300, work_dir_fd: 400, cg_root });
        assert!(request.starts_with(&[8, 2, 18, 7, 8, 5, 16, 9, 136, 1, 6]));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = notification(&bytes);
        }
    }
}
