//! nginx as a backend in a process of its own, which a scenario can kill and freeze.

use std::net::SocketAddr;
use std::process::Command;

use super::{Answer, Server, eventually, free_port, get, require};

/// nginx with one worker, which answers every request with its name.
pub struct Nginx {
    pub server: Server,
    pub address: SocketAddr,
}

impl Nginx {
    pub async fn start(name: &str) -> Self {
        Self::start_at(free_port(), name, 4096).await
    }

    /// [`Nginx::start`] on this port of 127.0.0.1, with an accept queue of `backlog` connections.
    pub async fn start_at(port: u16, name: &str, backlog: u32) -> Self {
        let program = require("nginx", "nginx");
        let server = Server::start(|folder| {
            let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|kind| format!("{kind}_temp_path {}/{kind}; ", folder.display()))
                .concat();
            let text = format!(
                "daemon off; master_process off; user root; pid {0}/pid; error_log stderr;\n\
                 events {{ worker_connections 1024; }}\n\
                 http {{ access_log off; keepalive_requests 1000; {temporary}\n\
                 server {{ listen 127.0.0.1:{port} backlog={backlog}; default_type text/plain;\n\
                 location / {{ return 200 \"{name}\"; }} }} }}\n",
                folder.display()
            );
            let config = folder.join("nginx.conf");
            std::fs::write(&config, text).expect("a file");
            let mut command = Command::new(program);
            command.arg("-p").arg(folder).arg("-c").arg(config).args(["-e", "stderr"]);
            command
        });
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        eventually("nginx answers", || async {
            get(address, "/").await.is_ok_and(|answer: Answer| answer.body == name)
        })
        .await;
        Self { server, address }
    }
}
