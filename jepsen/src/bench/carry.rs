//! How fast a guest's bytes get from host to host: over one connection and over several, with TLS, on loopback or a slow one. The two
//! vmm processes are left out: zeros go in, and nobody takes them out.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use anyhow::Context;
use clap::Args;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use consensus::pki::Clients;
use consensus::pki::ClusterCa;
use consensus::pki::HostKey;
use consensus::pki::Identity;
use consensus::pki::server_name;
use hostd::migration::lanes::gather;
use hostd::migration::lanes::spread;
use rustls::pki_types::ServerName;
use statemachine::HostId;
use statemachine::SiteId;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::TlsConnector;
use tokio_rustls::client;
use tokio_rustls::server;
use uuid::Uuid;

use super::network;

const CONNECTIONS: [u16; 4] = [1, 2, 4, 8];
const ALPN: &[&[u8]] = &[b"http/1.1"];

#[derive(Debug, Args)]
pub struct CarryArgs {
    /// Of a guest, each time
    #[arg(long, default_value_t = 512)]
    mib: u64,
    /// Each number of connections, by turns
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// What every packet takes, one way, in milliseconds (root: it makes a network namespace)
    #[arg(long, default_value_t = 0)]
    delay_ms: u32,
}

impl CarryArgs {
    pub fn delay_network(&self) -> anyhow::Result<()> {
        if self.delay_ms == 0 { Ok(()) } else { network::delay(self.delay_ms) }
    }
}

pub async fn run(args: &CarryArgs) -> anyhow::Result<()> {
    let road = Road::build().await?;
    let mut rates = CONNECTIONS.map(|_| Vec::new());
    for _ in 0..args.rounds {
        for (count, rates) in CONNECTIONS.into_iter().zip(&mut rates) {
            rates.push(road.carry(count, args.mib << 20).await?);
        }
    }
    let mut table = Table::new();
    table.load_preset(ASCII_MARKDOWN).set_header(["connections", "MiB/s", "least", "most"]);
    for (count, mut rates) in CONNECTIONS.into_iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let cell = |rate: Option<&f64>| rate.map_or(String::new(), |rate| format!("{rate:.0}"));
        table.add_row([count.to_string(), cell(rates.get(rates.len() / 2)), cell(rates.first()), cell(rates.last())]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    Ok(())
}

/// Two hosts on loopback.
struct Road {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Road {
    async fn build() -> anyhow::Result<Road> {
        let site = SiteId(Uuid::from_u128(1));
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64;
        let ca = ClusterCa::create(site, now_ms)?;
        let identity = |host: HostId| -> anyhow::Result<Identity> {
            let key = HostKey::generate()?;
            let issued = ca.sign_request(&key.signing_request()?, host, &[], now_ms)?;
            Ok(Identity::new(ca.certificate_pem(), &issued.certificate_pem, &key.to_pem())?)
        };
        let (source, target) = (HostId(1), HostId(2));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listen on loopback")?;
        let acceptor = TlsAcceptor::from(Arc::new(identity(target)?.server_config(Clients::Required, ALPN)?));
        let connector = TlsConnector::from(Arc::new(identity(source)?.client_config(ALPN)?));
        Ok(Road { listener, acceptor, connector, name: server_name(site, target).try_into()? })
    }

    async fn connection(&self) -> anyhow::Result<(client::TlsStream<TcpStream>, server::TlsStream<TcpStream>)> {
        let dial = async {
            let stream = TcpStream::connect(self.listener.local_addr()?).await?;
            stream.set_nodelay(true)?;
            Ok(self.connector.connect(self.name.clone(), stream).await?)
        };
        let answer = async {
            let (stream, _) = self.listener.accept().await?;
            Ok(self.acceptor.accept(stream).await?)
        };
        tokio::try_join!(dial, answer)
    }

    /// MiB a second.
    async fn carry(&self, connections: u16, bytes: u64) -> anyhow::Result<f64> {
        let mut ends = Vec::new();
        for _ in 0..connections {
            ends.push(self.connection().await?);
        }
        let (near, far): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
        let began = Instant::now();
        let sending = tokio::spawn(async move { spread(tokio::io::repeat(0).take(bytes), near).await });
        gather(far, &mut tokio::io::sink()).await?;
        let took = began.elapsed();
        sending.await??;
        Ok((bytes >> 20) as f64 / took.as_secs_f64())
    }
}
