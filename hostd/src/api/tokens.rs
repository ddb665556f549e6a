//! `/v1/tokens`. A secret is made here, shown once in the answer, and forgotten; the log gets its hash (hazard H27).

use axum::Json;
use axum::extract::Path;
use hostd_api::ApiToken;
use hostd_api::JoinToken;
use hostd_api::Problem;
use hostd_api::Secret;
use hostd_api::SecretText;
use hostd_api::problem::Code;
use hostd_api::read::List;
use hostd_api::read::ReadQuery;
use hostd_api::time;
use hostd_api::token::TokenCreate;
use hostd_api::token::TokenCreated;
use hostd_api::token::TokenView;
use hostd_api::vm::NoBody;
use hostd_api::write::WriteAnswer;
use rand::Rng;
use statemachine::Fold;
use statemachine::HostId;
use statemachine::TokenId;
use statemachine::command::Command;
use statemachine::state::Created;
use statemachine::state::TokenPurpose;
use statemachine::view::HostStatus;
use statemachine::view::host_status;

use super::extract::Administrator;
use super::extract::Body;
use super::extract::Looker;
use super::extract::Params;
use super::failure::Failure;

/// All tokens that the site remembers, without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens", params(ReadQuery),
    responses((status = 200, body = List<TokenView>), (status = "default", body = Problem)))]
pub async fn list(looker: Looker, Params(query): Params<ReadQuery>) -> Result<Json<List<TokenView>>, Failure> {
    let fold = looker.member.read(&query).await?;
    let now_ms = looker.member.now_ms();
    let items = fold.state.tokens.iter().map(|(id, token)| TokenView::of(*id, token, now_ms)).collect();
    Ok(Json(List { applied_seq: fold.head.seq, items }))
}

/// Makes a token. Its text is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = TokenCreate,
    responses((status = 200, body = TokenCreated), (status = "default", body = Problem)))]
pub async fn create(administrator: Administrator, body: Body<TokenCreate>) -> Result<Json<TokenCreated>, Failure> {
    let TokenCreate { purpose, ttl_ms, note } = body.value;
    let secret = new_secret();
    let command = Command::TokenCreate { purpose, secret_hash: secret.hash(), ttl_ms, note };
    let answer = administrator.write(body.hash, command).await?;
    let member = &administrator.member;
    member.catch_up(answer.seq).await?;
    let fold = member.fold();
    let Some(Created::Token(id)) = answer.created else {
        return Err(Failure::new(Code::Internal, "the log answered without a token"));
    };
    let token = fold.state.tokens.get(&id).filter(|token| token.secret_hash == secret.hash());
    let Some(token) = token else {
        let words =
            format!("this request was answered before, with token {id}, whose text was shown then and is not kept");
        let problem = Problem::new(Code::Retry, words);
        return Err(Problem { status: 409, ..problem }
            .action(format!("if it was lost: `quorate token revoke {id}`, and ask again with a new idempotency key"))
            .into());
    };
    let expires = time::of_ms(token.expires_ms);
    let text = text_of(&fold, member.own(), purpose, secret)?;
    Ok(Json(TokenCreated { seq: answer.seq, id, token: text, expires }))
}

/// The token is worth nothing from here on.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "tokens", params(("id" = u64, Path)),
    responses((status = 200, body = WriteAnswer), (status = "default", body = Problem)))]
pub async fn revoke(
    administrator: Administrator,
    Path(id): Path<String>,
    body: Body<NoBody>,
) -> Result<Json<WriteAnswer>, Failure> {
    let token: TokenId = id.parse().map_err(|_| {
        Problem::new(Code::BadRequest, "a token is named by its number")
            .action("`quorate token list` shows the numbers")
    })?;
    Ok(Json(administrator.write(body.hash, Command::TokenRevoke { token }).await?.into()))
}

fn new_secret() -> Secret {
    let mut bytes = [0; Secret::LEN];
    rand::rng().fill(&mut bytes);
    Secret::from_bytes(bytes)
}

fn text_of(fold: &Fold, own: HostId, purpose: TokenPurpose, secret: Secret) -> Result<SecretText, Failure> {
    let site = fold.state.site.as_ref().ok_or_else(|| Problem::new(Code::Internal, "the site has no name yet"))?;
    Ok(match purpose {
        TokenPurpose::Join => {
            JoinToken { site: site.id, ca: site.ca, secret, addresses: addresses(fold, own) }.to_text()
        }
        TokenPurpose::Admin | TokenPurpose::Viewer => ApiToken { site: site.id, secret }.to_text(),
    })
}

/// Where a new host may knock: here first, then at hosts that are up.
fn addresses(fold: &Fold, own: HostId) -> Vec<String> {
    let mut hosts: Vec<_> = fold.state.hosts.iter().collect();
    hosts.sort_by_key(|(id, host)| (**id != own, host_status(host) != HostStatus::Up));
    hosts.into_iter().take(JoinToken::ADDRESSES_MAX).map(|(_, host)| host.address.clone()).collect()
}
