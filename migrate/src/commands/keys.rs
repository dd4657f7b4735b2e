//! `migrate keys`: this host's key, and whom it trusts.

use super::{emit, say};
use crate::cli::Common;
use crate::error::Result;
use crate::identity::{self, Fingerprint, Identity, TrustStore};
use clap::Subcommand;
use serde_json::{Value, json};
use std::path::Path;
use std::process::ExitCode;

const EXAMPLE: &str = "\
Example, on both hosts in turn:
  host-a$ migrate keys init
  host-a$ migrate keys show           # prints the line to run on host-b
  host-b$ migrate keys trust host-a SHA256:…";

/// Make, show and exchange the keys by which hosts know each other.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make this host's key
    #[command(after_help = "Example:\n  migrate keys init")]
    Init {
        /// What to call this host in its certificate, for people [default: the host's name]
        #[arg(long)]
        name: Option<String>,
        /// Replace the key that is there: every host that trusts it must then trust the new one
        #[arg(long)]
        force: bool,
    },
    /// Print this host's fingerprint, and the line that makes another host trust it
    #[command(after_help = "Example:\n  migrate keys show --json | jq -r .fingerprint")]
    Show,
    /// Trust a host
    #[command(
        after_help = "Example:\n  migrate keys trust host-b SHA256:…   # as `migrate keys show` prints it there"
    )]
    Trust {
        /// What to call the host; if it is what you dial, only this key is accepted there
        name: String,
        /// The fingerprint of its key
        fingerprint: Fingerprint,
    },
    /// List the hosts that are trusted
    #[command(after_help = "Example:\n  migrate keys list")]
    List,
    /// Trust a host no longer: its next connection is refused
    #[command(after_help = "Example:\n  migrate keys revoke host-b")]
    Revoke {
        /// Its name, which removes all its keys, or one fingerprint
        #[arg(value_name = "NAME|FINGERPRINT")]
        host: String,
    },
}

/// Does what `args` say and prints to `out`.
///
/// # Errors
/// `Identity` as the text says; `Host` when `out` cannot be written to.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    for answer in answers(&identity::directory(common.keys.as_deref())?, &args.verb)? {
        match (common.json, answer.object) {
            (true, Some(object)) => emit(&object),
            (true, None) => {}
            (false, _) => say(&answer.text),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// One thing that a verb says.
struct Answer {
    /// For `--json`, if it has anything for scripts.
    object: Option<Value>,
    /// For people.
    text: String,
}

fn answer(object: Value, text: String) -> Answer {
    Answer { object: Some(object), text }
}

fn answers(dir: &Path, verb: &Verb) -> Result<Vec<Answer>> {
    Ok(match verb {
        Verb::Init { name, force } => {
            let name = name.clone().unwrap_or_else(identity::this_host);
            let identity = Identity::init(dir, &name, *force)?;
            let text = format!("made a key in {}\n{}", dir.display(), describe(&identity));
            vec![answer(object(&identity), text)]
        }
        Verb::Show => {
            let identity = Identity::load(dir)?;
            vec![answer(object(&identity), describe(&identity))]
        }
        Verb::Trust { name, fingerprint } => {
            let added = TrustStore::load(dir)?.add(name, *fingerprint)?;
            let text = if added { "trusted" } else { "was trusted already" };
            vec![answer(
                json!({"name": name, "fingerprint": fingerprint, "added": added}),
                format!("{name} {fingerprint} {text}"),
            )]
        }
        Verb::List => {
            let trust = TrustStore::load(dir)?;
            let none = "no host is trusted: `migrate keys trust NAME FINGERPRINT` adds one";
            match trust.list() {
                [] => vec![Answer { object: None, text: none.into() }],
                hosts => hosts
                    .iter()
                    .map(|host| answer(json!(host), format!("{} {}", host.name, host.fingerprint)))
                    .collect(),
            }
        }
        Verb::Revoke { host } => TrustStore::load(dir)?
            .revoke(host)?
            .iter()
            .map(|host| answer(json!(host), format!("{} {} revoked", host.name, host.fingerprint)))
            .collect(),
    })
}

fn trust_line(identity: &Identity) -> String {
    format!("migrate keys trust {} {}", identity::this_host(), identity.fingerprint())
}

fn describe(identity: &Identity) -> String {
    format!("{}\nrun on the other host:  {}", identity.fingerprint(), trust_line(identity))
}

fn object(identity: &Identity) -> Value {
    json!({
        "fingerprint": identity.fingerprint(),
        "directory": identity.dir().to_string_lossy(),
        "trust_command": trust_line(identity),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        keys: Args,
    }

    fn parse(words: &[&str]) -> std::result::Result<Line, clap::Error> {
        Line::try_parse_from(["keys"].iter().chain(words))
    }

    /// What is said to a script (`json`) or to people, a line an answer.
    fn said(dir: &Path, words: &[&str], json: bool) -> Result<String> {
        let answers = answers(dir, &parse(words).unwrap().keys.verb)?;
        Ok(answers
            .into_iter()
            .filter_map(
                |answer| {
                    if json { answer.object.map(|object| object.to_string()) } else { Some(answer.text) }
                },
            )
            .map(|line| line + "\n")
            .collect())
    }

    fn keys(dir: &Path, words: &[&str]) -> Result<String> {
        let (json, words): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| **word == "--json");
        said(dir, &words, !json.is_empty())
    }

    #[test]
    fn two_hosts_exchange_keys_and_one_is_revoked() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        keys(&a, &["init", "--name", "a"]).unwrap();
        keys(&b, &["init"]).unwrap();
        let shown: Value = serde_json::from_str(&keys(&a, &["show", "--json"]).unwrap()).unwrap();
        let print = shown["fingerprint"].as_str().unwrap();
        assert!(keys(&a, &["show"]).unwrap().contains(&format!(" {print}\n")));
        assert!(keys(&b, &["list"]).unwrap().contains("no host is trusted"));
        assert_eq!(keys(&b, &["list", "--json"]).unwrap(), "");
        assert!(keys(&b, &["trust", "a", print]).unwrap().ends_with(" trusted\n"));
        assert!(keys(&b, &["trust", "a", print, "--json"]).unwrap().contains("\"added\":false"));
        let listed: Value = serde_json::from_str(&keys(&b, &["list", "--json"]).unwrap()).unwrap();
        assert_eq!(listed, json!({"name": "a", "fingerprint": print}));
        assert_eq!(keys(&b, &["revoke", "a"]).unwrap(), format!("a {print} revoked\n"));
        assert!(keys(&b, &["revoke", "a"]).is_err());
    }

    #[test]
    fn a_key_is_not_replaced_by_accident_and_a_bad_fingerprint_is_a_usage_error() {
        let tmp = tempfile::tempdir().unwrap();
        keys(tmp.path(), &["init"]).unwrap();
        assert!(keys(tmp.path(), &["init"]).is_err());
        keys(tmp.path(), &["init", "--force"]).unwrap();
        assert!(parse(&["trust", "a", "SHA256:no"]).is_err());
    }
}
