//! [`FileSystem`]: what kind of file system a folder lies on, and how far its locks reach: a
//! cache that several machines see is safe only where the lock of one holds for the others.
//!
//! Read from the system's list of mounts (Linux, `/proc/self/mountinfo`, see proc(5)); elsewhere
//! nothing is known. Nothing here is tried out: a lock that is granted says nothing of who else
//! would be refused.
//!
//! | file system | its `flock` |
//! |---|---|
//! | NFS | holds for all clients, unless it is mounted with `nolock`, `local_lock=flock` or `local_lock=all` (nfs(5)) |
//! | SMB | holds for all clients, unless it is mounted with `nobrl` (mount.cifs(8)) |
//! | Lustre | holds for all clients with `flock`, for this one with `localflock`; else there is none (mount.lustre(8)) |
//! | CephFS, GFS2, OCFS2, GPFS | holds for all machines |
//! | FUSE, 9p, AFS, BeeGFS and others of the network | depends on what is behind it |

use std::path::{Path, PathBuf};

/// How far the locks of a file system reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// No other machine has its files.
    Local,
    /// They hold for every machine that has its files.
    All,
    /// They hold for this machine only, though others may have its files.
    ThisMachine,
    /// Others may have its files, and nothing says whether locks hold for them.
    Unknown,
    /// It has none.
    None,
}

/// The file system that a folder lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    /// As the system calls it: `ext4`, `nfs4`, `fuse.sshfs`.
    pub kind: String,
    /// How far its locks reach.
    pub reach: Reach,
}

impl FileSystem {
    /// That of a folder, which need not exist yet; `None` where the system does not tell.
    #[must_use]
    pub fn of(folder: &Path) -> Option<Self> {
        let mounts = std::fs::read("/proc/self/mountinfo").ok()?;
        let absolute = std::path::absolute(folder).ok()?;
        let there = absolute
            .ancestors()
            .find_map(|path| path.canonicalize().ok());
        Self::in_mounts(&String::from_utf8_lossy(&mounts), &there?)
    }

    /// The same by a list of mounts; `folder` is a path without links.
    fn in_mounts(mounts: &str, folder: &Path) -> Option<Self> {
        let mut found: Option<(usize, Self)> = None;
        for line in mounts.lines() {
            let Some((point, kind, options)) = mount(line) else {
                continue;
            };
            if !folder.starts_with(&point) {
                continue;
            }
            let depth = point.components().count();
            // Of those at one place the last one is seen.
            if found.as_ref().is_none_or(|(deepest, _)| *deepest <= depth) {
                let reach = reach(kind, &options);
                let kind = kind.to_owned();
                found = Some((depth, Self { kind, reach }));
            }
        }
        found.map(|(_, file_system)| file_system)
    }

    /// What is dangerous about a cache folder there, and what to do instead.
    #[must_use]
    pub fn danger(&self) -> Option<String> {
        let kind = &self.kind;
        match self.reach {
            Reach::Local | Reach::All | Reach::Unknown => None,
            Reach::ThisMachine => Some(format!(
                "the cache folder is on {kind}, which is mounted so that locks hold on this machine only: runs of several machines on it at once would spoil it. Mount it with locks that all machines see (nfs(5): without `nolock` and `local_lock`), or give each machine a cache folder of its own and a common `--remote`, which may be a folder there"
            )),
            Reach::None => Some(format!(
                "the cache folder is on {kind}, which is mounted without locks. Mount it with them (Lustre: `flock`), or choose a folder of this machine with `--cache-dir` and put a common `--remote` there"
            )),
        }
    }
}

/// Where it is mounted, its kind, and the options of the mount and of the file system.
fn mount(line: &str) -> Option<(PathBuf, &str, Vec<&str>)> {
    // 36 35 98:0 /root /point rw,noatime shared:1 - ext4 /dev/sda rw,errors=continue
    let (ours, theirs) = line.split_once(" - ")?;
    let mut ours = ours.split(' ').skip(4);
    let (point, options) = (ours.next()?, ours.next()?);
    let mut theirs = theirs.split(' ');
    let kind = theirs.next()?;
    let more = theirs.nth(1).unwrap_or_default();
    let options = options.split(',').chain(more.split(',')).collect();
    Some((PathBuf::from(unescaped(point)), kind, options))
}

/// Blanks and backslashes are written as three octal digits.
fn unescaped(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        let digits = rest.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                bytes = &rest[3..];
            }
            None => {
                out.push(*first);
                bytes = rest;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn reach(kind: &str, options: &[&str]) -> Reach {
    let has = |option: &str| options.contains(&option);
    let all_unless = |local: bool| match local {
        true => Reach::ThisMachine,
        false => Reach::All,
    };
    match kind {
        "nfs" | "nfs4" => {
            all_unless(has("nolock") || has("local_lock=flock") || has("local_lock=all"))
        }
        "cifs" | "smb3" | "smbfs" => all_unless(has("nobrl")),
        "lustre" if has("flock") => Reach::All,
        "lustre" if has("localflock") => Reach::ThisMachine,
        "lustre" => Reach::None,
        "ceph" | "gfs2" | "ocfs2" | "gpfs" => Reach::All,
        "9p" | "afs" | "beegfs" | "glusterfs" | "orangefs" | "pvfs2" | "virtiofs" | "vboxsf"
        | "coda" => Reach::Unknown,
        fuse if fuse == "fuse" || fuse.starts_with("fuse.") => Reach::Unknown,
        _ => Reach::Local,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
21 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
30 21 0:25 / /tmp rw,nosuid - tmpfs tmpfs rw,size=1g
40 21 0:40 / /mnt/team rw,relatime shared:2 - nfs4 files:/team rw,vers=4.2,local_lock=none,addr=10.0.0.1
41 21 0:41 / /mnt/alone rw,relatime - nfs files:/a rw,vers=3,nolock,local_lock=all
42 21 0:42 / /mnt/my\\040disk rw - cifs //files/x rw,vers=3.1.1,nobrl
43 21 0:43 / /mnt/far rw - fuse.sshfs me@far: rw,user_id=0
44 21 0:44 / /lus rw - lustre mgs@tcp:/fs rw,lazystatfs
45 21 0:45 / /lus/locked rw - lustre mgs@tcp:/fs rw,flock,lazystatfs
46 40 254:2 / /mnt/team/disk rw - xfs /dev/vdb rw
47 21 0:47 / /mnt/far rw - ext4 /dev/vdc rw
broken line
";

    fn of(folder: &str) -> (String, Reach) {
        let found = FileSystem::in_mounts(MOUNTS, Path::new(folder)).unwrap();
        (found.kind, found.reach)
    }

    #[test]
    fn the_mount_that_a_folder_lies_on_says_how_far_its_locks_reach() {
        for (folder, kind, reach) in [
            ("/home/me/.flowrun", "ext4", Reach::Local),
            ("/tmp/x", "tmpfs", Reach::Local),
            ("/mnt/team/cache", "nfs4", Reach::All),
            ("/mnt/team/disk/cache", "xfs", Reach::Local),
            ("/mnt/teams", "ext4", Reach::Local),
            ("/mnt/alone/cache", "nfs", Reach::ThisMachine),
            ("/mnt/my disk/cache", "cifs", Reach::ThisMachine),
            ("/lus/cache", "lustre", Reach::None),
            ("/lus/locked/cache", "lustre", Reach::All),
            // Another was mounted over it.
            ("/mnt/far/cache", "ext4", Reach::Local),
        ] {
            assert_eq!(of(folder), (kind.to_owned(), reach), "{folder}");
        }
        let before: Vec<&str> = MOUNTS
            .lines()
            .filter(|line| !line.starts_with("47"))
            .collect();
        let far = FileSystem::in_mounts(&before.join("\n"), Path::new("/mnt/far/x")).unwrap();
        assert_eq!(far.reach, Reach::Unknown);
        assert_eq!(FileSystem::in_mounts("", Path::new("/x")), None);
    }

    #[test]
    fn only_what_can_spoil_a_cache_is_a_danger_and_says_what_to_do() {
        let danger = |reach| {
            let kind = "nfs".to_owned();
            FileSystem { kind, reach }.danger()
        };
        for reach in [Reach::Local, Reach::All, Reach::Unknown] {
            assert_eq!(danger(reach), None);
        }
        for reach in [Reach::ThisMachine, Reach::None] {
            let text = danger(reach).unwrap();
            assert!(
                text.contains("`--remote`") && text.contains("nfs"),
                "{text}"
            );
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_tells_of_its_own_folders() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileSystem::of(&dir.path().join("not/there/yet")).is_some());
        assert_eq!(FileSystem::of(Path::new("/proc")).unwrap().kind, "proc");
    }
}
