//! What `--help` says below the options: examples, exit codes and environment variables.

pub(super) const HELP: &str = "\
Examples:
  statera demo                                     watch a proxy follow the weights
  statera check -c /etc/statera/config.yaml        find mistakes before a start
  statera run -c /etc/statera/config.yaml
  statera weights get web                          the weights of the pool `web`
  statera weights set web 10.0.0.1:80=50 --wait    change one, and wait until every proxy uses it
  statera weights drain web 10.0.0.1:80 --wait     send it no new sessions, and wait for the last one

Exit codes:
  0  done
  1  failed; the message says why
  2  wrong arguments, or an invalid config
  3  --wait: some proxies are not ready in time (the change itself is made)
  4  Redis cannot be reached (weights)

Environment:
  NAME           replaces ${NAME} in a value or key of the config; ${NAME:-text} stands for `text` where
                 NAME is not set or empty; $${NAME} stays ${NAME}
  USER, LOGNAME  who made a change, for `statera weights history`
  SSL_CERT_FILE, SSL_CERT_DIR
                 the root certificates for TLS to Redis, where redis.tls.ca_file is left out";

pub(super) const RUN_HELP: &str = "\
Example:
  statera run -c /etc/statera/config.yaml

Exit codes: 0 stopped by a signal; 1 could not start, or a part of the proxy failed; 2 invalid config.
Standard output has the log, unless log.output in the config says `stderr`.";

pub(super) const CHECK_HELP: &str = "\
Example:
  statera check -c config.yaml && systemctl restart statera

Prints problems and warnings to standard error. Nothing is started, and no network is asked.
Exit codes: 0 valid, perhaps with warnings; 2 invalid.";

pub(super) const DEMO_HELP: &str = "\
Example:
  statera demo --seconds 60

Needs redis-server in the PATH to change weights while it runs. It prints the commands to try.";

pub(super) const WEIGHTS_HELP: &str = "\
Examples:
  statera weights get web
  statera weights set web 10.0.0.1:80=50 10.0.0.2:80=0 --reason \"less for the old one\" --wait
  statera weights simulate web 10.0.0.1:80=50
  statera weights rollback web

Each command reads the config (-c) for the pool's key and for the address and password of Redis.
Exit codes: 0 done; 1 failed; 2 wrong arguments or invalid config; 3 --wait: some proxies are not
ready in time; 4 Redis cannot be reached.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use crate::cli::Arguments;

    fn help(names: &[&str]) -> String {
        let mut command = Arguments::command();
        command.build();
        let command = names.iter().fold(&mut command, |command, name| {
            command.find_subcommand_mut(name).expect("there is such a command")
        });
        command.render_long_help().to_string()
    }

    #[test]
    fn help_names_examples_exit_codes_and_variables() {
        let text = help(&[]);
        for part in
            ["Examples:", "Exit codes:", "  3  --wait", "  4  Redis", "USER, LOGNAME", "${NAME:-text}"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        for command in ["run", "check", "weights"] {
            assert!(help(&[command]).contains("Exit codes: 0 "), "{command}");
        }
        for command in ["run", "check", "demo", "weights"] {
            assert!(help(&[command]).contains("Example"), "{command}");
        }
    }

    #[test]
    fn help_says_what_a_command_does_without_the_line_above_it() {
        let maint = help(&["weights", "maint"]);
        assert!(maint.contains("no new sessions") && maint.contains("health"), "{maint}");
        let set = help(&["weights", "set"]);
        assert!(set.contains("Wait until every proxy uses the change"), "{set}");
        let rollback = help(&["weights", "rollback"]);
        assert!(rollback.contains("The version to go back to"), "{rollback}");
    }

    /// clap does not wrap lines here.
    #[test]
    fn help_fits_into_its_width() {
        let weights = ["get", "set", "simulate", "remove", "drain", "maint", "ready", "history", "rollback"];
        let weights: Vec<[&str; 2]> = weights.iter().map(|name| ["weights", name]).collect();
        let all = [&[][..], &["run"], &["check"], &["demo"], &["weights"]];
        for names in all.into_iter().chain(weights.iter().map(|names| &names[..])) {
            for line in help(names).lines() {
                assert!(line.chars().count() <= 120, "{names:?}: {line}");
            }
        }
    }
}
