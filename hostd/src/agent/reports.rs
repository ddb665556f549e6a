//! What this host owes the log, one report at a time. Level-triggered: a report that was lost is owed again; one that was decided
//! is held back until applied state shows it.

use std::collections::BTreeMap;
use std::sync::Arc;

use consensus::decider::ProposeError;
use statemachine::command::Actor;
use statemachine::command::Command;
use statemachine::command::HostFacts;
use statemachine::command::ReportId;
use statemachine::command::Request;
use statemachine::fold::Fold;
use statemachine::ids::BootId;
use statemachine::ids::Epoch;
use statemachine::ids::HostId;
use statemachine::ids::Seq;
use statemachine::ids::VmId;
use statemachine::state::HostProcessor;
use statemachine::state::Liveness;

use super::cluster::Cluster;
use super::plan::Ended;
use super::plan::News;
use super::plan::NewsKind;
use crate::lease::clock::Boottime;

const RETRY_MIN_MS: u64 = 200;
const RETRY_MAX_MS: u64 = 5_000;

/// What a report is about; at most one a subject is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Host,
    Processor,
    Guest(VmId, NewsKind),
}

/// News of a guest for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owed {
    pub vm: VmId,
    pub epoch: Epoch,
    pub news: News,
}

impl Owed {
    fn command(&self, report: ReportId) -> Command {
        let Owed { vm, epoch, ref news } = *self;
        match news.clone() {
            News::Exited(Ended { reason, detail }) => Command::ReportVmExited { report, vm, epoch, reason, detail },
            News::Status(status) => Command::ReportVmStatus { report, vm, epoch, status },
            News::MigrationFailed(migration, detail) => {
                Command::ReportMigrationFailed { report, vm, migration, detail }
            }
            News::MigrationLoaded(migration) => Command::ReportMigrationLoaded { report, vm, migration },
            News::MigrationProgress(migration, progress) => {
                Command::ReportMigrationProgress { report, vm, migration, progress }
            }
            News::SuspensionFailed(suspension, detail) => {
                Command::ReportSuspensionFailed { report, vm, suspension, detail }
            }
            News::Suspended(suspension, bytes) => Command::ReportVmSuspended { report, vm, suspension, bytes },
            News::Device(device, word) => Command::ReportVmDevice { report, vm, epoch, device, word },
            News::DiskFault(fault) => Command::ReportVmDiskFault { report, vm, epoch, fault },
            News::Facts(facts) => Command::ReportVmGuest { report, vm, epoch, facts },
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Held {
    /// Decided: wait until applied state has reached this.
    seq: Option<Seq>,
    /// Failed: wait until then.
    until: Boottime,
    failures: u32,
}

/// Which reports may go now.
#[derive(Debug)]
pub struct Reports {
    host: HostId,
    boot: BootId,
    held: BTreeMap<Subject, Held>,
    under_way: Option<Subject>,
    counter: u64,
    /// What this host's processor can be to guests, once it was looked at.
    pub processor: Option<HostProcessor>,
}

/// How a report ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    Decided(Seq),
    Failed(String),
}

impl Reports {
    pub fn new(host: HostId, boot: BootId) -> Reports {
        Reports { host, boot, held: BTreeMap::new(), under_way: None, counter: 0, processor: None }
    }

    /// The next report, if one is owed and none is under way. The host's own word goes first: before it, the log takes this
    /// boot's reports for another's.
    pub fn next(&mut self, facts: &HostFacts, fold: &Fold, owed: &[Owed], now: Boottime) -> Option<(Subject, Request)> {
        if self.under_way.is_some() {
            return None;
        }
        self.held
            .retain(|_, held| held.seq.is_some_and(|seq| fold.head.seq < seq) || held.until > now || held.failures > 0);
        let known = fold.state.hosts.get(&self.host)?;
        let news = known.facts != *facts || known.liveness == Liveness::New;
        if news {
            let facts = facts.clone();
            return self.take(Subject::Host, fold, now, |report| Command::ReportHost { report, facts });
        }
        let level = fold.state.site.as_ref().map_or(0, |site| site.feature_level);
        let processor = self.processor.clone().filter(|_| level >= HostProcessor::FEATURE_LEVEL);
        if let Some(processor) = processor.filter(|own| fold.state.processors.get(&self.host) != Some(own)) {
            let told =
                self.take(Subject::Processor, fold, now, |report| Command::ReportProcessor { report, processor });
            if told.is_some() {
                return told;
            }
        }
        let mut owed: Vec<&Owed> = owed.iter().collect();
        owed.sort_by_key(|owed| owed.news.kind());
        owed.into_iter().find_map(|owed| {
            let subject = Subject::Guest(owed.vm, owed.news.kind());
            self.take(subject, fold, now, |report| owed.command(report))
        })
    }

    fn take(
        &mut self,
        subject: Subject,
        fold: &Fold,
        now: Boottime,
        command: impl FnOnce(ReportId) -> Command,
    ) -> Option<(Subject, Request)> {
        let waits = |held: &Held| held.until > now || held.seq.is_some_and(|seq| fold.head.seq < seq);
        if self.held.get(&subject).is_some_and(waits) {
            return None;
        }
        self.under_way = Some(subject);
        // Rises within the boot, also over a restart of hostd: the clock does.
        self.counter = now.as_ns().max(self.counter + 1);
        let report = ReportId { host: self.host, boot: self.boot, counter: self.counter };
        let command = command(report);
        Some((subject, Request { actor: Actor::Host(self.host), origin: self.host, idempotency: None, command }))
    }

    pub fn settle(&mut self, subject: Subject, told: &Told, now: Boottime) {
        self.under_way = None;
        match told {
            Told::Decided(seq) => {
                self.held.insert(subject, Held { seq: Some(*seq), until: now, failures: 0 });
            }
            Told::Failed(_) => {
                let failures = self.held.get(&subject).map_or(0, |held| held.failures).saturating_add(1);
                let wait_ms = (RETRY_MIN_MS << failures.min(6)).min(RETRY_MAX_MS);
                self.held.insert(subject, Held { seq: None, until: now.plus_ms(wait_ms), failures });
            }
        }
    }
}

/// Has a report decided.
pub async fn tell(cluster: Arc<dyn Cluster>, request: Request) -> Told {
    match cluster.propose(request).await {
        Ok(answer) => Told::Decided(answer.seq),
        Err(error @ (ProposeError::Rejected(_) | ProposeError::Retry { .. } | ProposeError::Busy { .. }))
        | Err(error @ (ProposeError::NoLeader | ProposeError::NotLeader { .. })) => Told::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_site::Site;
    use crate::test_site::boot;
    use crate::test_site::facts;
    use crate::test_site::spec;
    use statemachine::state::CpuModel;
    use statemachine::state::GuestStatus;
    use statemachine::state::ReleaseClass;

    #[test]
    fn a_host_speaks_of_itself_first_and_of_one_thing_at_a_time() {
        let site = Site::with_hosts(1);
        let host = site.hosts[0];
        let vm = site.define("web", spec(ReleaseClass::Operator));
        let epoch = site.start(vm, host);
        let owed = [Owed { vm, epoch, news: News::Status(GuestStatus::Up) }];
        let now = Boottime::from_ms(1);
        let mut reports = Reports::new(host, boot(9));
        let (subject, request) = reports.next(&facts(boot(9)), &site.now(), &owed, now).unwrap();
        assert_eq!(subject, Subject::Host);
        assert_eq!(reports.next(&facts(boot(9)), &site.now(), &owed, now), None, "one is under way");
        let before = site.now();
        let seq = site.request(&request).unwrap().seq;
        reports.settle(subject, &Told::Decided(seq), now);
        assert_eq!(reports.next(&facts(boot(9)), &before, &owed, now), None, "it waits until its own word is applied");
        let mut reports = Reports::new(host, boot(1));
        let site = Site::with_hosts(1);
        let vm = site.define("web", spec(ReleaseClass::Operator));
        let epoch = site.start(vm, host);
        let owed = [Owed { vm, epoch, news: News::Status(GuestStatus::Up) }];
        let (subject, request) = reports.next(&facts(boot(1)), &site.now(), &owed, now).unwrap();
        assert_eq!(subject, Subject::Guest(vm, NewsKind::Status));
        site.request(&request).unwrap();
    }

    #[test]
    fn a_host_says_once_what_its_processor_can_be() {
        let site = Site::with_hosts(1);
        let processor = HostProcessor {
            vendor: "GenuineIntel".to_owned(),
            model_name: "a processor".to_owned(),
            models: vec![CpuModel::V2],
            fingerprint: "1".to_owned(),
            tsc_khz: 2_000_000,
            scales_tsc: false,
        };
        let now = Boottime::from_ms(1);
        let mut reports = Reports::new(site.hosts[0], boot(1));
        assert_eq!(reports.next(&facts(boot(1)), &site.now(), &[], now), None);
        reports.processor = Some(processor);
        let (subject, request) = reports.next(&facts(boot(1)), &site.now(), &[], now).unwrap();
        assert_eq!(subject, Subject::Processor);
        let seq = site.request(&request).unwrap().seq;
        reports.settle(subject, &Told::Decided(seq), now);
        assert_eq!(reports.next(&facts(boot(1)), &site.now(), &[], now), None);
    }

    #[test]
    fn a_report_that_failed_waits_a_moment_and_lets_others_pass() {
        let site = Site::with_hosts(1);
        let host = site.hosts[0];
        let status = |name| {
            let vm = site.define(name, spec(ReleaseClass::Operator));
            Owed { vm, epoch: site.start(vm, host), news: News::Status(GuestStatus::Up) }
        };
        let owed = [status("a"), status("b")];
        let now = Boottime::from_ms(1);
        let mut reports = Reports::new(host, boot(1));
        let (first, _) = reports.next(&facts(boot(1)), &site.now(), &owed, now).unwrap();
        reports.settle(first, &Told::Failed("no leader".to_owned()), now);
        let (second, _) = reports.next(&facts(boot(1)), &site.now(), &owed, now).unwrap();
        assert_ne!(first, second);
        reports.settle(second, &Told::Failed("no leader".to_owned()), now);
        assert_eq!(reports.next(&facts(boot(1)), &site.now(), &owed, now), None);
        assert!(reports.next(&facts(boot(1)), &site.now(), &owed, now.plus_ms(RETRY_MAX_MS)).is_some());
    }
}
