//! Further connections of a migration, where one core is the limit of one.

use super::{Outbound, understood};
use crate::conversation::{Sender, out_of_order};
use crate::error::{Error, Result};
use protocol::control::{Downstream, Upstream};
use protocol::handshake::Hello;

impl Outbound<'_> {
    /// Another connection to the same destination, greeted; what is heard there has blobs of at most `max_blob_bytes`.
    ///
    /// # Errors
    /// Those of the link; `Identity` where somebody else answers; `Interrupted`.
    pub(super) fn dial_again(&mut self, max_blob_bytes: u32) -> Result<Sender> {
        let link = (self.dial)()?;
        if link.peer_key() != self.peer_key {
            return Err(Error::Identity(format!(
                "{} answers where {} was: that is another host, and does not have what was sent",
                link.peer(),
                self.report.peer
            )));
        }
        let (limit, cancel) = (self.options.stall, self.cancel);
        let mut watch = || cancel.check().map(|()| 0);
        let mut talk = Sender::new(link, max_blob_bytes);
        talk.introduce(&Downstream::Hello(Hello::ours()), limit)?;
        talk.preamble(limit, &mut watch)?;
        match understood(talk.hear("the destination's greeting", limit, &mut watch)?.0)? {
            Upstream::Hello(hello) => hello.agree()?,
            other => return Err(out_of_order("Hello", other.name())),
        };
        Ok(talk)
    }

    /// Makes the further connections, before any page stream is opened.
    pub(super) fn join(&mut self) -> Result<()> {
        let (limit, cancel, migration) = (self.options.stall, self.cancel, self.options.migration);
        let mut further = Vec::new();
        for connection in 1..self.report.connections.number {
            let mut talk = self.dial_again(0)?;
            talk.say(&Downstream::Join { migration, connection }, &[], limit)?;
            let heard = talk.hear("the destination to take a further connection", limit, &mut || {
                cancel.check().map(|()| 0)
            });
            match understood(heard?.0)? {
                Upstream::Accept => further.push(talk.into_link()?),
                other => return Err(out_of_order("Accept", other.name())),
            }
        }
        self.talk.widen(further, self.options.page_streams);
        Ok(())
    }
}
