//! Reads files that a key names: a password, a token, a certificate, a private key.
//!
//! A file is read once, when the config is loaded. No message shows any of its content.

use std::fs::File;
use std::io::{self, Read};

use crate::config::Secret;
use crate::config::decode::Field;

/// A larger file is the wrong one: it is no password.
const SECRET_MAX_BYTES: usize = 64 * 1024;
/// A file of all public root certificates has 220 KiB.
const PEM_MAX_BYTES: usize = 1024 * 1024;

/// Reads the secret in the file that `field` names. One line end at its end is removed: editors and
/// `echo` add it.
pub(super) fn read(field: &Field<'_>) -> Option<Secret> {
    let bytes = read_bytes(field, SECRET_MAX_BYTES)?;
    let Ok(mut text) = String::from_utf8(bytes) else {
        field.refuse("the file is not UTF-8: save it as UTF-8");
        return None;
    };
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    if text.is_empty() {
        field.refuse("the file is empty: write the secret into it, or remove this key");
        return None;
    }
    Some(Secret::new(text))
}

/// Reads the file of certificates or keys that `field` names.
pub(super) fn read_pem(field: &Field<'_>) -> Option<Vec<u8>> {
    read_bytes(field, PEM_MAX_BYTES)
}

fn read_bytes(field: &Field<'_>, most: usize) -> Option<Vec<u8>> {
    let path = field.text()?;
    let mut bytes = Vec::new();
    let opened = File::open(path);
    if let Err(error) = opened.and_then(|file| file.take(most as u64 + 1).read_to_end(&mut bytes)) {
        field.refuse(cure_for(&error));
        return None;
    }
    if bytes.len() > most {
        field.refuse(format_args!("the file is larger than {} KiB: is it the right one?", most / 1024));
        return None;
    }
    Some(bytes)
}

fn cure_for(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file: create it, or correct the path".to_owned(),
        io::ErrorKind::IsADirectory => "it is a directory: name the file in it".to_owned(),
        io::ErrorKind::PermissionDenied => "no permission to read it: let this user read the file".to_owned(),
        _ => format!("it cannot be read: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::config::{Config, LoadError};

    fn load(password_file: &std::path::Path) -> Result<Option<String>, LoadError> {
        let text = format!(
            "redis: {{password_file: {password_file:?}}}\n\
             listeners: {{a: {{bind: '127.0.0.1:0', pool: a}}}}\npools: {{a: {{}}}}"
        );
        let password = Config::from_yaml(&text)?.redis.and_then(|redis| redis.password);
        Ok(password.map(|password| password.expose().to_owned()))
    }

    #[test]
    fn exactly_one_line_end_is_not_part_of_the_secret() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        for (content, expected) in [("geheim", "geheim"), (" a \n", " a "), ("a\r\n", "a"), ("a\n\n", "a\n")]
        {
            fs::write(&path, content).unwrap();
            assert_eq!(load(&path).unwrap().as_deref(), Some(expected), "{content:?}");
        }
    }

    #[test]
    fn a_secret_that_cannot_be_read_is_a_problem_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("password");
        let message = |path: &std::path::Path| load(path).unwrap_err().to_string();
        assert!(message(&path).contains("there is no such file: create it, or correct the path (line 1)"));
        assert!(message(&path).contains("redis.password_file: /"));
        assert!(message(directory.path()).contains("it is a directory: name the file in it"));
        fs::write(&path, "\n").unwrap();
        assert!(message(&path).contains("the file is empty"));
        fs::write(&path, b"\xff\xfe").unwrap();
        assert!(message(&path).contains("not UTF-8"));
        fs::write(&path, "x".repeat(70_000)).unwrap();
        assert!(message(&path).contains("larger than 64 KiB"));
    }
}
