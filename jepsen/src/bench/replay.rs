//! One host alone with a long log: how fast it decides, stores, starts again, reads its stream and folds it.

use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::bail;
use clap::Args;
use comfy_table::CellAlignment;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use consensus::decider::session::ENTRY_COMMANDS;
use consensus::platform::Platform;
use consensus::store::Store;
use consensus::types::Entry;
use consensus::types::LeaderId;
use consensus::types::LogId;
use consensus::types::Payload;
use consensus::types::Proposal;
use consensus::types::TokioRuntime;
use consensus::types::TypeConfig;
use openraft::storage::IOFlushed;
use openraft::storage::RaftLogStorage;
use openraft::storage::RaftSnapshotBuilder;
use openraft::storage::RaftStateMachine;
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use statemachine::Fold;
use statemachine::Seq;
use statemachine::batch::SealedBatch;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::Request;
use statemachine::fold::Decision;

use super::process::resident_mib;
use super::site::SUBJECTS;
use super::words;
use super::words::FIRST;

type C = TypeConfig<TokioRuntime>;

const READ_BATCHES: usize = 4096;
const READ_BYTES: usize = 4 << 20;
/// The log is cut behind a snapshot this often, as a host does it.
const SNAPSHOT_EVERY: u64 = 20_000;

#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// Batches of one event each
    #[arg(long, default_value_t = 1_000_000)]
    events: u64,
    /// Bytes that each carries
    #[arg(long, default_value_t = 256)]
    bytes: usize,
}

/// What was measured, for people.
struct Rows(Table);

impl Rows {
    fn new() -> Rows {
        let mut table = Table::new();
        table.load_preset(ASCII_MARKDOWN).set_header(["what", "took", "rate", "resident MiB"]);
        Rows(table)
    }

    fn row(&mut self, what: &str, count: u64, took: Duration) {
        let seconds = took.as_secs_f64();
        let rate = if count == 0 { String::new() } else { format!("{:.0}/s", count as f64 / seconds) };
        let resident = resident_mib(std::process::id()).map_or(String::new(), |mib| format!("{mib:.0}"));
        self.0.add_row([what.to_owned(), format!("{seconds:.2} s"), rate, resident]);
    }

    fn print(mut self) {
        for column in 1..4 {
            if let Some(column) = self.0.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        println!("{}", self.0);
    }
}

/// A site of one host and some VMs, and commands that change one after the other.
struct Writer {
    fold: Fold,
    vms: Vec<statemachine::ids::VmId>,
    bytes: usize,
    n: u64,
}

impl Writer {
    fn decide(&mut self, command: Command, actor: Actor) -> anyhow::Result<SealedBatch> {
        let request = Request { actor, origin: FIRST, idempotency: None, command };
        self.n += 1;
        match self.fold.decide(&request, self.n) {
            Decision::Batch { batch, sealed, .. } => {
                self.fold.append(&batch, &sealed);
                Ok(sealed)
            }
            Decision::Settled(_) => bail!("a command that changes nothing"),
            Decision::Rejected(why) => bail!("refused: {why}"),
        }
    }

    fn begin(bytes: usize) -> anyhow::Result<(Writer, Vec<SealedBatch>)> {
        let mut writer = Writer { fold: Fold::default(), vms: Vec::new(), bytes, n: 0 };
        let mut sealed = vec![writer.decide(words::site_init(), Actor::Root(FIRST))?];
        for number in 0..SUBJECTS {
            sealed.push(writer.decide(words::vm_define(number), Actor::Root(FIRST))?);
        }
        writer.vms = writer.fold.state.vms.iter().map(|(vm, _)| *vm).collect();
        Ok((writer, sealed))
    }

    fn next(&mut self) -> anyhow::Result<SealedBatch> {
        let vm = *self.vms.get(self.n as usize % SUBJECTS).context("a VM")?;
        self.decide(words::vm_change(vm, self.n, self.bytes), Actor::Root(FIRST))
    }
}

fn log_id(index: u64) -> LogId {
    LogId::new(LeaderId::new(1, 1).to_committed(), index)
}

async fn put(store: &mut Store, index: u64, batches: Vec<SealedBatch>) -> anyhow::Result<()> {
    let entry = Entry { log_id: log_id(index), payload: Payload::Normal(Proposal::new(batches)) };
    let (done, is_done) = C::oneshot();
    let callback: IOFlushed<C> = IOFlushed::signal(done);
    RaftLogStorage::<C>::append(&mut store.log, vec![entry.clone()], callback).await?;
    is_done.await.context("the writer has stopped")??;
    let items = futures::stream::iter([Ok((entry, None))]);
    RaftStateMachine::<C>::apply(&mut store.state_machine, items).await?;
    Ok(())
}

async fn snapshot(store: &mut Store, upto: u64) -> anyhow::Result<()> {
    let mut builder = RaftStateMachine::<C>::get_snapshot_builder(&mut store.state_machine).await;
    RaftSnapshotBuilder::<C>::build_snapshot(&mut builder).await?;
    RaftLogStorage::<C>::purge(&mut store.log, log_id(upto)).await?;
    Ok(())
}

pub async fn run(args: &ReplayArgs, dir: &Path) -> anyhow::Result<()> {
    let dir = std::path::absolute(dir)?.join("replay");
    if dir.exists() {
        std::fs::remove_dir_all(&dir)?;
    }
    let mut rows = Rows::new();
    let (mut writer, mut batches) = Writer::begin(args.bytes)?;
    let began = Instant::now();
    let mut sample = Vec::new();
    for _ in 0..args.events.min(50_000) {
        sample.push(writer.next()?);
    }
    rows.row("decide and seal, in memory", sample.len() as u64, began.elapsed());
    drop(sample);

    let (mut fresh, mut written) = (Writer::begin(args.bytes)?.0, batches.len() as u64);
    let mut store = Store::open(Platform::real(), &dir).await?;
    let (began, mut index, mut cut) = (Instant::now(), 1, 0);
    put(&mut store, index, std::mem::take(&mut batches)).await?;
    while written < args.events {
        let count = (args.events - written).min(ENTRY_COMMANDS as u64);
        let next = (0..count).map(|_| fresh.next()).collect::<anyhow::Result<Vec<_>>>()?;
        written += count;
        index += 1;
        put(&mut store, index, next).await?;
        if written - cut >= SNAPSHOT_EVERY {
            snapshot(&mut store, index).await?;
            cut = written;
        }
    }
    rows.row("decide, append with fdatasync, apply, snapshots", args.events, began.elapsed());
    store.close().await;

    let began = Instant::now();
    let mut store = Store::open(Platform::real(), &dir).await?;
    let mut reader = store.log.reader();
    // What lies behind the snapshot is applied again, as openraft does it at a start.
    let applied = RaftStateMachine::<C>::applied_state(&mut store.state_machine).await?.0.map_or(0, |last| last.index);
    let rest = openraft::storage::RaftLogReader::<C>::try_get_log_entries(&mut reader, applied + 1..).await?;
    let items = futures::stream::iter(rest.into_iter().map(|entry| Ok((entry, None))));
    RaftStateMachine::<C>::apply(&mut store.state_machine, items).await?;
    rows.row("start again, up to the head", 0, began.elapsed());

    let (began, mut after, mut bytes) = (Instant::now(), Seq(0), 0);
    while after.0 < args.events {
        let read = store.events.read(after, READ_BATCHES, READ_BYTES).await?;
        bytes += read.iter().map(|batch| batch.sealed.as_bytes().len()).sum::<usize>();
        after = read.last().context("the stream ends early")?.seq;
    }
    rows.row(&format!("read the whole stream ({:.0} MiB)", bytes as f64 / 1048576.0), args.events, began.elapsed());

    let (mut fold, mut evolving) = (Fold::default(), Duration::ZERO);
    while fold.head.seq.0 < args.events {
        let read = store.events.read(fold.head.seq, READ_BATCHES, READ_BYTES).await?;
        let began = Instant::now();
        for batch in &read {
            fold.apply_sealed(&batch.sealed)?;
        }
        evolving += began.elapsed();
    }
    rows.row("decode, verify the chain and evolve", args.events, evolving);
    if fold.state.digest() != store.fold.borrow().state.digest() {
        bail!("the stream folds to another state than the host has");
    }
    store.close().await;
    rows.print();
    Ok(())
}
