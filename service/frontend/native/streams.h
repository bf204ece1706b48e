// HTTP/2 streams: requests read, answers written, and everything that is not served here passed on and back.
#pragma once

#include <string>

#include "endpoint.h"

namespace onclock {

// Begin to send `stream.answer`.
void submit_answer(Stream &stream);
// Answer with an HTTP status that is not 200, for what is not gRPC.
void submit_http_error(Stream &stream, const char *status);
// Send the request of a stream, and what follows it, to the upstream of its connection.
void submit_relayed(Stream &stream);
// A connected socket, or -1.
int connect_unix(const std::string &path);
// The value of a `grpc-timeout` header in ns; kNever when it is not well formed or too long to matter.
int64_t parse_timeout(const char *text, size_t size);
// A status message as the header wants it (gRPC over HTTP/2, "Percent-Encoded").
std::string percent_encode(const std::string &text);

}  // namespace onclock
