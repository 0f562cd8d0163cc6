//! [`Held`]: what a file or folder of the project is to hold, for all that steps make of it.

use flowrun_cache::{Artifact, ArtifactKind, Digest};
use serde::{Deserialize, Serialize};

/// What a path held when a run rested on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Held {
    artifact: Artifact,
    /// A file that is no program must not be one: a step took it, and may tell. Else whoever it was
    /// published for may have made it one.
    exact: bool,
}

impl Held {
    /// This, with the mode that it has.
    pub(super) fn exactly(artifact: Artifact) -> Self {
        Self {
            artifact,
            exact: true,
        }
    }

    /// These bytes; a file that is no program may be one.
    pub(super) fn at_least(artifact: Artifact) -> Self {
        Self {
            artifact,
            exact: false,
        }
    }

    pub(super) fn kind(&self) -> ArtifactKind {
        self.artifact.kind
    }

    /// The digest of its bytes, where it is a file.
    pub(super) fn file_digest(&self) -> Option<Digest> {
        (self.kind() == ArtifactKind::File).then_some(self.artifact.digest)
    }

    /// It is this now.
    pub(super) fn is(&self, now: &Artifact) -> bool {
        let may_be = match self.exact {
            true => now.executable == self.artifact.executable,
            false => now.executable || !self.artifact.executable,
        };
        may_be && self.is_alike(now)
    }

    /// Holds what another step asks for too; false, and as it was, when both cannot be.
    pub(super) fn takes(&mut self, other: &Self) -> bool {
        let (mine, its) = (self.artifact.executable, other.artifact.executable);
        let may_be = match (self.exact, other.exact) {
            (true, true) => mine == its,
            (true, false) => mine || !its,
            (false, true) => its || !mine,
            (false, false) => true,
        };
        let both = may_be && self.is_alike(&other.artifact);
        if both {
            self.artifact.executable |= its;
            self.exact |= other.exact;
        }
        both
    }

    /// The same, whether it is a program or not.
    fn is_alike(&self, other: &Artifact) -> bool {
        let Artifact {
            digest, kind, size, ..
        } = &self.artifact;
        (*digest, *kind, *size) == (other.digest, other.kind, other.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8], executable: bool) -> Artifact {
        Artifact {
            digest: Digest::of_bytes(bytes),
            kind: ArtifactKind::File,
            size: bytes.len() as u64,
            executable,
        }
    }

    #[test]
    fn what_is_published_may_be_made_a_program_and_what_a_step_takes_may_not() {
        let [plain, program] = [false, true].map(|executable| file(b"x", executable));
        let is = |held: &Held| [&plain, &program].map(|now| held.is(now));
        assert_eq!(is(&Held::at_least(plain.clone())), [true, true]);
        assert_eq!(is(&Held::at_least(program.clone())), [false, true]);
        assert_eq!(is(&Held::exactly(plain.clone())), [true, false]);
        assert_eq!(is(&Held::exactly(program.clone())), [false, true]);
        assert_eq!(is(&Held::at_least(file(b"y", false))), [false, false]);
    }

    #[test]
    fn what_several_steps_ask_for_is_all_held() {
        let asked = |executable: bool| {
            let artifact = file(b"x", executable);
            [Held::at_least(artifact.clone()), Held::exactly(artifact)]
        };
        let all = [asked(false), asked(true)].concat();
        let states = [file(b"x", false), file(b"x", true)];
        for one in &all {
            for other in &all {
                let mut held = one.clone();
                let can = states.iter().any(|now| one.is(now) && other.is(now));
                assert_eq!(held.takes(other), can, "{one:?} {other:?}");
                for now in &states {
                    let wanted = one.is(now) && (!can || other.is(now));
                    assert_eq!(held.is(now), wanted, "{one:?} {other:?}");
                }
            }
            let mut held = one.clone();
            assert!(!held.takes(&Held::at_least(file(b"y", false))));
            assert_eq!(&held, one);
        }
    }
}
