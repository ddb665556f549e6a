//! Every refusal of the API is a problem of RFC 9457; this is where other errors become one.

use axum::Json;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use hostd_api::PROBLEM_MEDIA_TYPE;
use hostd_api::Problem;
use hostd_api::problem::Code;

use crate::auth::Refusal;

/// What handlers return instead of an answer.
#[derive(Debug)]
pub struct Failure(Box<Problem>);

impl Failure {
    pub fn new(code: Code, detail: impl Into<String>) -> Failure {
        Failure::from(Problem::new(code, detail))
    }

    pub fn problem(&self) -> &Problem {
        &self.0
    }

    pub fn into_problem(self) -> Problem {
        *self.0
    }
}

impl<E: Into<Problem>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(Box::new(error.into()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let problem = self.into_problem();
        let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(detail = problem.detail, "a request failed inside hostd");
        }
        let retry = problem.is_transient();
        let mut response = (status, Json(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_MEDIA_TYPE));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if retry {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        let code = match refusal.is_about_credentials() {
            true => Code::Unauthenticated,
            false => Code::Forbidden,
        };
        Problem::new(code, refusal.to_string())
    }
}
