//! The API's resources as methods. Hosts and VMs are named by name or id.

use std::time::Duration;

use hostd_api::cluster::ClusterPatch;
use hostd_api::cluster::ClusterView;
use hostd_api::digest::DigestQuery;
use hostd_api::digest::StateDigest;
use hostd_api::guest::AgentView;
use hostd_api::guest::DEFAULT_EXEC_WAIT_S;
use hostd_api::guest::Exec;
use hostd_api::guest::ExecAnswer;
use hostd_api::guest::Freeze;
use hostd_api::guest::Frozen;
use hostd_api::guest::MAX_EXEC_WAIT_S;
use hostd_api::guest::Obeyed;
use hostd_api::host::HostPatch;
use hostd_api::host::HostView;
use hostd_api::host::SpmView;
use hostd_api::read::Item;
use hostd_api::read::List;
use hostd_api::read::ReadQuery;
use hostd_api::site::InitRequest;
use hostd_api::site::JoinRequest;
use hostd_api::site::LeaveRequest;
use hostd_api::site::Membership;
use hostd_api::site::SitePatch;
use hostd_api::status::Status;
use hostd_api::token::TokenCreate;
use hostd_api::token::TokenCreated;
use hostd_api::token::TokenView;
use hostd_api::vm::NoBody;
use hostd_api::vm::VmCreate;
use hostd_api::vm::VmMemory;
use hostd_api::vm::VmMigrate;
use hostd_api::vm::VmPatch;
use hostd_api::vm::VmStart;
use hostd_api::vm::VmStop;
use hostd_api::vm::VmView;
use hostd_api::vm::WhyView;
use hostd_api::write::WriteAnswer;
use statemachine::Seq;
use statemachine::TokenId;

use super::Client;
use super::ClientError;

/// Beyond the time of a program: freezing a guest takes a minute at most, and hosts have to hear of it.
const GUEST_ANSWERS_WITHIN: Duration = Duration::from_secs(90);

/// A read that sees the write that was answered with `seq`.
fn at_least(seq: Option<Seq>) -> ReadQuery {
    ReadQuery { min_seq: seq, consistency: None }
}

impl Client {
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get(&["v1", "status"], &()).await
    }

    pub async fn init(&self, request: &InitRequest) -> Result<Membership, ClientError> {
        self.post(&["v1", "init"], request).await
    }

    pub async fn join(&self, request: &JoinRequest) -> Result<Membership, ClientError> {
        self.post(&["v1", "join"], request).await
    }

    pub async fn leave(&self) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "leave"], &LeaveRequest {}).await
    }

    pub async fn token_create(&self, request: &TokenCreate) -> Result<TokenCreated, ClientError> {
        self.post(&["v1", "tokens"], request).await
    }

    pub async fn tokens(&self) -> Result<List<TokenView>, ClientError> {
        self.get(&["v1", "tokens"], &()).await
    }

    pub async fn token_revoke(&self, token: TokenId) -> Result<WriteAnswer, ClientError> {
        self.delete(&["v1", "tokens", &token.to_string()]).await
    }

    pub async fn hosts(&self) -> Result<List<HostView>, ClientError> {
        self.get(&["v1", "hosts"], &()).await
    }

    pub async fn host(&self, host: &str, min_seq: Option<Seq>) -> Result<Item<HostView>, ClientError> {
        self.get(&["v1", "hosts", host], &at_least(min_seq)).await
    }

    pub async fn host_change(&self, host: &str, patch: &HostPatch) -> Result<WriteAnswer, ClientError> {
        self.patch(&["v1", "hosts", host], patch).await
    }

    pub async fn site_change(&self, patch: &SitePatch) -> Result<WriteAnswer, ClientError> {
        self.patch(&["v1", "site"], patch).await
    }

    pub async fn host_maintenance(&self, host: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "hosts", host, "maintenance"], &NoBody {}).await
    }

    pub async fn host_activate(&self, host: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "hosts", host, "activate"], &NoBody {}).await
    }

    pub async fn host_remove(&self, host: &str) -> Result<WriteAnswer, ClientError> {
        self.delete(&["v1", "hosts", host]).await
    }

    pub async fn vm_create(&self, request: &VmCreate) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms"], request).await
    }

    pub async fn vms(&self) -> Result<List<VmView>, ClientError> {
        self.get(&["v1", "vms"], &()).await
    }

    pub async fn vm(&self, vm: &str, min_seq: Option<Seq>) -> Result<Item<VmView>, ClientError> {
        self.get(&["v1", "vms", vm], &at_least(min_seq)).await
    }

    pub async fn vm_change(&self, vm: &str, patch: &VmPatch) -> Result<WriteAnswer, ClientError> {
        self.patch(&["v1", "vms", vm], patch).await
    }

    pub async fn vm_delete(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.delete(&["v1", "vms", vm]).await
    }

    pub async fn vm_start(&self, vm: &str, request: &VmStart) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "start"], request).await
    }

    pub async fn vm_stop(&self, vm: &str, request: &VmStop) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "stop"], request).await
    }

    pub async fn vm_reset(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "reset"], &NoBody {}).await
    }

    pub async fn vm_memory(&self, vm: &str, mib: u64) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "memory"], &VmMemory { mib }).await
    }

    pub async fn clusters(&self) -> Result<List<ClusterView>, ClientError> {
        self.get(&["v1", "clusters"], &()).await
    }

    pub async fn cluster_change(&self, cluster: &str, patch: &ClusterPatch) -> Result<WriteAnswer, ClientError> {
        self.patch(&["v1", "clusters", cluster], patch).await
    }

    pub async fn vm_migrate(&self, vm: &str, request: &VmMigrate) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "migrate"], request).await
    }

    pub async fn vm_cancel_migration(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "cancel-migration"], &NoBody {}).await
    }

    pub async fn vm_suspend(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "suspend"], &NoBody {}).await
    }

    pub async fn vm_pause(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "pause"], &NoBody {}).await
    }

    pub async fn vm_resume(&self, vm: &str) -> Result<WriteAnswer, ClientError> {
        self.post(&["v1", "vms", vm, "resume"], &NoBody {}).await
    }

    pub async fn guest_agent(&self, vm: &str) -> Result<AgentView, ClientError> {
        self.get(&["v1", "vms", vm, "agent"], &()).await
    }

    pub async fn guest_exec(&self, vm: &str, request: &Exec) -> Result<ExecAnswer, ClientError> {
        let wait_s = request.wait_s.unwrap_or(DEFAULT_EXEC_WAIT_S).min(MAX_EXEC_WAIT_S);
        let within = Duration::from_secs(wait_s.into()) + GUEST_ANSWERS_WITHIN;
        self.post_once(&["v1", "vms", vm, "agent", "exec"], request, within).await
    }

    pub async fn guest_freeze(&self, vm: &str, request: &Freeze) -> Result<Frozen, ClientError> {
        self.post_once(&["v1", "vms", vm, "agent", "freeze"], request, GUEST_ANSWERS_WITHIN).await
    }

    /// `thaw`, `set-time` or `reboot`.
    pub async fn guest_order(&self, vm: &str, verb: &str) -> Result<Obeyed, ClientError> {
        self.post_once(&["v1", "vms", vm, "agent", verb], &NoBody {}, GUEST_ANSWERS_WITHIN).await
    }

    pub async fn why(&self, vm: &str) -> Result<Item<WhyView>, ClientError> {
        self.get(&["v1", "vms", vm, "why"], &()).await
    }

    pub async fn spm(&self) -> Result<List<SpmView>, ClientError> {
        self.get(&["v1", "spm"], &()).await
    }

    pub async fn state_digest(&self) -> Result<StateDigest, ClientError> {
        self.get(&["v1", "state", "digest"], &DigestQuery::default()).await
    }
}
