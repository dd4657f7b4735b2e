//! Which processor a guest is shown: the host's own, or one that many hosts can be.

use std::{io::Read as _, path::Path};

use super::{Leaf, Template, TemplateFile, template};
use crate::{
    error::{Error, Result},
    host::Host,
};

/// The longest file of a template that is read, in bytes: every feature there is has some 30.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// A model of processor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CpuModel {
    /// All that this host has.
    #[default]
    Host,
    /// The features of a template and no others.
    Template(Box<Template>),
}

impl CpuModel {
    /// Reads `host`, the name of a level, or the path of a template's file.
    ///
    /// # Errors
    /// [`Error::Config`] that says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        if text == "host" {
            return Ok(Self::Host);
        }
        let template = match template::level(text) {
            Some(level) => level,
            None => TemplateFile::read(Path::new(text))?.template()?,
        };
        Ok(Self::Template(Box::new(template)))
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        match self {
            Self::Host => "host",
            Self::Template(template) => template.name(),
        }
    }

    /// The leaves of this model, made of all that a host has.
    pub(super) fn apply(&self, leaves: Vec<Leaf>) -> Result<Vec<Leaf>> {
        match self {
            Self::Host => Ok(leaves),
            Self::Template(template) => template.apply(leaves),
        }
    }

    /// Checks that guests of this model can be started on a host.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] that names what the host lacks.
    pub fn check(&self, host: &Host) -> Result<()> {
        super::describe(host, 1, self, false).map(drop)
    }

    /// The template of guests that are shown this model on a host.
    ///
    /// # Errors
    /// As [`CpuModel::check`].
    pub fn on(&self, host: &Host) -> Result<TemplateFile> {
        Ok(TemplateFile::of(self.name(), &super::describe(host, 1, self, false)?))
    }
}

impl TemplateFile {
    /// Reads a template's file.
    ///
    /// # Errors
    /// [`Error::Config`] that names it and says what is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |why: String| Error::Config(format!("CPU template {}: {why}", path.display()));
        let file = std::fs::File::open(path).map_err(|error| {
            let models = "a CPU is host, x86-64-v2, x86-64-v3, or the path of a template's file";
            wrong(format!("{error}; {models}"))
        })?;
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(wrong(format!("it has more than {MAX_FILE_BYTES} bytes")));
        }
        Self::parse(&text).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm_tests::host;

    #[test]
    fn a_model_is_a_name_or_a_file() {
        assert_eq!(CpuModel::parse("host").unwrap(), CpuModel::Host);
        for level in ["x86-64-v2", "x86-64-v3"] {
            assert_eq!(CpuModel::parse(level).unwrap().name(), level);
        }
        let refused = |text: &str| CpuModel::parse(text).unwrap_err().to_string();
        assert!(refused("x86-64-v9").contains("x86-64-v9: No such file"), "{}", refused("x86-64-v9"));
        assert!(refused("x86-64-v9").contains("x86-64-v3"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.json");
        let path_text = path.to_str().unwrap();
        for (text, says) in [
            ("", "EOF"),
            ("{}", "format"),
            (r#"{"format": 2, "name": "a", "features": []}"#, "format 2"),
            (r#"{"format": 1, "name": "a", "features": [], "more": 1}"#, "more"),
            (r#"{"format": 1, "name": "a", "features": ["sse9"]}"#, "sse9"),
            (r#"{"format": 1, "name": "a", "features": ["avx2"]}"#, "avx2 needs avx"),
            (r#"{"format": 1, "name": "a", "features": ["svm"]}"#, "--nested"),
            (r#"{"format": 1, "name": "a", "features": ["xcr0.avx"]}"#, "xcr0.avx"),
            (r#"{"format": 1, "name": "a\u001b", "features": []}"#, "name"),
            (r#"{"format": 1, "name": "a", "vendor": "x", "features": []}"#, "vendor"),
            (r#"{"format": 1, "name": "a", "physical_bits": 9, "features": []}"#, "physical_bits"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = refused(path_text);
            assert!(error.contains(says) && error.contains(path_text), "{text}: {error}");
        }
        std::fs::write(&path, vec![b' '; 65 << 10]).unwrap();
        assert!(refused(path_text).contains("65536 bytes"));
        std::fs::write(&path, [0xff; 9]).unwrap();
        refused(path_text);
    }

    #[test]
    fn what_a_host_is_shown_to_be_it_can_be_again() {
        let Some(host) = host() else { return };
        let here = CpuModel::Host.on(&host).unwrap();
        let template = CpuModel::Template(Box::new(here.clone().template().unwrap()));
        assert_eq!(TemplateFile { name: "host".into(), ..template.on(&host).unwrap() }, here);
        template.check(&host).unwrap();
        // A guest of the template moves to the whole host, and one of the whole host not to the template's if that hides something.
        let [whole, masked] =
            [&CpuModel::Host, &template].map(|cpu| crate::cpuid::describe(&host, 2, cpu, false).unwrap());
        crate::cpuid::check(&masked, &whole).unwrap();
    }
}
