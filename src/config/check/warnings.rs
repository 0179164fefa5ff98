//! Finds settings that are valid but most likely a mistake.
//!
//! A config with warnings runs as it is written. Each warning names its cure, and only settings that are
//! almost surely a mistake are warned of. This runs after the whole config has been read without a
//! problem.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Access, access};
use rustix::io::Errno;

use crate::config::decode::{Field, Section};
use crate::config::{Config, HealthCheck, Pool};

pub(super) fn look(root: &Section<'_>, config: &Config) {
    state_dir(root, config);
    let Some(pools) = root.field("pools").map(open) else { return };
    for ((name, field), pool) in pools.entries().zip(&config.pools) {
        if config.listeners.iter().all(|listener| &*listener.pool != name) {
            field.warn_unshown("no listener uses it: name it as the pool of a listener, or remove it");
        }
        // A retry needs another backend. A table in Redis may have one.
        if config.redis.is_some() || pool.backends.len() > 1 {
            connect(&field, pool);
        }
        if let Some(check) = &pool.health_check {
            health_check(&field, check);
        }
        fail_open(&field, pool);
        queue(&field, pool);
        if config.redis.is_none() {
            without_redis(&field, pool);
        }
    }
}

/// Opens a map that has been read without a problem.
fn open(field: Field<'_>) -> Section<'_> {
    Section::open_values(field, "")
}

/// The value below `field` at the path `keys`.
fn below<'a>(field: &Field<'a>, keys: &[&str]) -> Option<Field<'a>> {
    let deeper = |field: Field<'a>, key: &&str| {
        field.is_map().then(|| open(field)).and_then(|section| section.field(key))
    };
    keys.iter().try_fold(field.clone(), deeper)
}

/// Warns at the first of the `paths` that is written.
fn warn_at(field: &Field<'_>, paths: &[&[&str]], message: &str) {
    if let Some(field) = paths.iter().find_map(|keys| below(field, keys)) {
        field.warn(message);
    }
}

fn shown(duration: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(duration)
}

fn connect(field: &Field<'_>, pool: &Pool) {
    let connect = &pool.connect;
    // With one attempt nothing is retried.
    if connect.attempts.get() > 1 && connect.timeout >= connect.deadline {
        let message = format!(
            "the first attempt may use up the deadline, and then no other backend is tried: \
             lower timeout ({}) or raise deadline ({})",
            shown(connect.timeout),
            shown(connect.deadline)
        );
        warn_at(field, &[&["connect", "timeout"], &["connect", "deadline"]], &message);
    }
}

fn health_check(field: &Field<'_>, check: &HealthCheck) {
    if check.timeout > check.interval {
        let message = format!(
            "a check may last longer than the interval between two checks: \
             lower timeout ({}) or raise interval ({})",
            shown(check.timeout),
            shown(check.interval)
        );
        warn_at(field, &[&["health_check", "timeout"], &["health_check", "interval"]], &message);
    }
    match (&check.send, &check.expect) {
        (Some(_), None) => warn_at(
            field,
            &[&["health_check", "send"]],
            "no answer is read, so a backend that accepts connections but does not answer passes: \
             write expect too",
        ),
        (None, Some(expect)) if is_answer(expect) => warn_at(
            field,
            &[&["health_check", "expect"]],
            "nothing is sent, so only a backend that speaks first passes: write send too",
        ),
        _ => {}
    }
    if check.expect.as_deref().is_some_and(looks_like_a_pattern) {
        warn_at(
            field,
            &[&["health_check", "expect"]],
            "the answer must contain exactly this text, it is no pattern: write the text itself",
        );
    }
}

/// Whether `expect` is a regular expression, as HAProxy's `rstring` takes it: `[NS]`, `[0-9]`, `.*`,
/// `N|S`, `^220`.
fn looks_like_a_pattern(expect: &[u8]) -> bool {
    let is_letter = u8::is_ascii_alphanumeric;
    let has_range =
        |class: &[u8]| matches!(class, [b'[', from, b'-', to] if is_letter(from) && is_letter(to));
    let has_wildcard = expect.windows(2).any(|pair| pair == b".*" || pair == b".+");
    let is_either = [&b"[NS]"[..], b"[SN]", b"N|S", b"S|N", b"(N|S)", b"(S|N)"].contains(&expect);
    is_either || expect.starts_with(b"^") || has_wildcard || expect.windows(4).any(has_range)
}

/// Whether `expect` is an answer of a protocol in which the client speaks first: HTTP, Redis, PostgreSQL.
/// Any other text may be a greeting, as in SMTP, SSH, MySQL or NATS.
fn is_answer(expect: &[u8]) -> bool {
    let begins = [&b"HTTP/"[..], b"+PONG", b"PONG"].iter().any(|begin| expect.starts_with(begin));
    begins || expect == b"N" || expect == b"S"
}

fn fail_open(field: &Field<'_>, pool: &Pool) {
    let has_health = pool.health_check.is_some() || pool.outlier.is_some();
    if pool.fail_open >= 1.0 && has_health {
        warn_at(
            field,
            &[&["fail_open_percent"]],
            "health is ignored as soon as one backend is unhealthy: write less",
        );
    }
}

fn queue(field: &Field<'_>, pool: &Pool) {
    if pool.capacity.queue_size == 0 {
        warn_at(
            field,
            &[&["queue", "timeout"]],
            "without a size no session waits: write size too, or remove the queue",
        );
    }
}

fn without_redis(field: &Field<'_>, pool: &Pool) {
    warn_at(field, &[&["weights_key"]], "without redis it is not used: add a redis section, or remove it");
    if pool.backends.iter().all(|(_, weight)| weight.is_zero()) {
        let message = "all weights are 0, and only redis could change them: every session is refused";
        if let Some(field) = below(field, &["backends"]) {
            field.warn_unshown(message);
        }
    }
}

/// Warns of a folder that cannot be used. Nothing is created; the folder may still change before the
/// proxy starts.
fn state_dir(root: &Section<'_>, config: &Config) {
    let (Some(folder), Some(field)) = (&config.state_dir, root.field("state_dir")) else { return };
    if config.redis.is_none() {
        field.warn("without redis there are no tables to keep: add a redis section, or remove it");
    } else if let Err(reason) = can_be_made(folder) {
        field.warn(format_args!("no table can be kept there: {reason}"));
    }
}

/// Checks that this user can write to `folder`, or can create it. The error is the reason.
fn can_be_made(folder: &Path) -> Result<(), String> {
    for there in folder.ancestors() {
        let shown = || crate::config::decode::escaped(&there.to_string_lossy(), 200);
        match fs::metadata(there) {
            Ok(found) if !found.is_dir() => return Err(format!("{} is not a directory", shown())),
            Ok(_) => {
                let allowed = access(there, Access::WRITE_OK | Access::EXEC_OK);
                return allowed.map_err(|errno| match errno {
                    Errno::ACCESS | Errno::PERM => format!("this user may not write to {}", shown()),
                    Errno::ROFS => format!("{} is on a file system that is read-only", shown()),
                    _ => format!("{}: {}", shown(), io::Error::from(errno)),
                });
            }
            // Nothing can be created under the name of a link that leads nowhere.
            Err(_) if fs::symlink_metadata(there).is_ok_and(|found| found.is_symlink()) => {
                return Err(format!("{} is a link to nothing", shown()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A parent is no directory: a later round of the loop reports it.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(format!("{}: {error}", shown())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_folder_that_cannot_be_made_is_found_without_making_any() {
        let root = tempfile::tempdir().expect("a folder");
        let file = root.path().join("file");
        fs::write(&file, "").expect("a file");
        symlink(root.path().join("missing"), root.path().join("link")).expect("a link");
        let reason = |path: &str| can_be_made(&root.path().join(path)).err();
        assert_eq!((reason(""), reason("new"), reason("new/and/deeper")), (None, None, None));
        for (path, expected) in [
            ("file", "file is not a directory"),
            ("file/below", "file is not a directory"),
            ("link", "link is a link to nothing"),
            ("link/below", "link is a link to nothing"),
        ] {
            assert!(
                reason(path).is_some_and(|reason| reason.ends_with(expected)),
                "{path}: {:?}",
                reason(path)
            );
        }
        assert_eq!(fs::read_dir(root.path()).expect("a folder").count(), 2, "nothing was made");
    }

    #[test]
    fn a_pattern_is_told_from_text() {
        for pattern in [&b"[NS]"[..], b"^220", b"HTTP/1.. 2.*", b"[0-9]+", b"(N|S)"] {
            assert!(looks_like_a_pattern(pattern), "{pattern:?}");
        }
        for text in
            [&b"+PONG"[..], b"HTTP/1.1 200", b"[\"ok\"]", b"{\"state\": [1, 2]}", b"[OK]", b"a-b", b"220 "]
        {
            assert!(!looks_like_a_pattern(text), "{text:?}");
        }
    }

    #[test]
    fn greetings_are_what_a_server_says_first() {
        for greeting in
            [&b"220 "[..], b"SSH-2.0", b"+OK", b"* OK", b"RFB 003", b"SSH", b"INFO", b"OK MPD", b"\x0a8.0\0"]
        {
            assert!(!is_answer(greeting), "{greeting:?}");
        }
        for answer in [&b"PONG"[..], b"+PONG", b"HTTP/1.1 200", b"N", b"S"] {
            assert!(is_answer(answer), "{answer:?}");
        }
    }
}
