#include "streams.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

namespace onclock {
namespace {

// What a connection may send unasked. Served messages are taken off at once; relayed ones as they are passed on, so
// this bounds what a relayed stream and a connection can make us hold.
constexpr int32_t kStreamWindow = 4 << 20;
constexpr int32_t kConnectionWindow = 16 << 20;
// Clients send frames as long as they are allowed: longer ones cost less for each byte.
constexpr uint32_t kFrame = 1 << 20;
// All headers of a request; gRPC's own soft limit is 8 KiB, its hard limit 16 KiB.
constexpr size_t kHeaderBytes = 64 << 10;
// A piece of an answer at most this long is copied rather than referred to.
constexpr size_t kCopy = 4096;

Connection &connection_of(void *user) { return *static_cast<Connection *>(static_cast<Channel *>(user)); }
Upstream &upstream_of(void *user) { return *static_cast<Upstream *>(static_cast<Channel *>(user)); }

Stream *stream_of(nghttp2_session *session, int32_t id) {
  return static_cast<Stream *>(nghttp2_session_get_stream_user_data(session, id));
}

bool equals(const nghttp2_vec &text, const char *other) {
  return text.len == strlen(other) && !memcmp(text.base, other, text.len);
}

template <size_t N, size_t M>
nghttp2_nv literal(const char (&name)[N], const char (&value)[M]) {
  return {reinterpret_cast<uint8_t *>(const_cast<char *>(name)), reinterpret_cast<uint8_t *>(const_cast<char *>(value)),
          N - 1, M - 1, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

template <size_t N>
nghttp2_nv field(const char (&name)[N], const std::string &value, uint8_t flags = NGHTTP2_NV_FLAG_NONE) {
  return {reinterpret_cast<uint8_t *>(const_cast<char *>(name)),
          reinterpret_cast<uint8_t *>(const_cast<char *>(value.data())), N - 1, value.size(), flags};
}

const nghttp2_nv kStatus200 = literal(":status", "200");
const nghttp2_nv kContentType = literal("content-type", "application/grpc");
const nghttp2_nv kAcceptEncoding = literal("grpc-accept-encoding", "identity, deflate, gzip");
const nghttp2_nv kStatusOk = literal("grpc-status", "0");

// ----------------------------------------------------------------------------------------- a client's connection: reading

int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
  Connection &connection = connection_of(user);
  auto *stream = new Stream;
  stream->connection = &connection;
  stream->id = frame->hd.stream_id;
  stream->next = connection.streams;
  if (stream->next) stream->next->previous = stream;
  connection.streams = stream;
  connection.open_streams++;
  nghttp2_session_set_stream_user_data(session, stream->id, stream);
  return 0;
}

// Headers of one name are one list.
void join(Stream &stream, std::string TraceHeaders::*which, const nghttp2_vec &text) {
  if (!stream.trace) stream.trace = std::make_unique<TraceHeaders>();
  std::string &value = (*stream.trace).*which;
  if (!value.empty()) value += ',';
  value.append(reinterpret_cast<const char *>(text.base), text.len);
}

int on_header(nghttp2_session *session, const nghttp2_frame *frame, nghttp2_rcbuf *name, nghttp2_rcbuf *value, uint8_t,
              void *user) {
  if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
  Stream *stream = stream_of(session, frame->hd.stream_id);
  if (!stream) return 0;
  const nghttp2_vec key = nghttp2_rcbuf_get_buf(name), text = nghttp2_rcbuf_get_buf(value);
  stream->header_bytes += key.len + text.len + 32;
  if (stream->header_bytes > kHeaderBytes) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
  const char *chars = reinterpret_cast<const char *>(text.base);
  if (equals(key, ":path")) {
    stream->served_path = equals(text, connection_of(user).endpoint.method.c_str());
  } else if (equals(key, ":method")) {
    stream->is_post = equals(text, "POST");
  } else if (equals(key, "content-type")) {
    // "application/grpc", "application/grpc+proto", "application/grpc;..."; not "application/grpc-web".
    stream->is_grpc = text.len >= 16 && !memcmp(chars, "application/grpc", 16) &&
                      (text.len == 16 || chars[16] == '+' || chars[16] == ';');
  } else if (equals(key, "grpc-timeout")) {
    stream->timeout_ns = parse_timeout(chars, text.len);
  } else if (equals(key, "grpc-encoding")) {
    stream->encoding = equals(text, "identity")  ? Encoding::kIdentity
                       : equals(text, "gzip")    ? Encoding::kGzip
                       : equals(text, "deflate") ? Encoding::kDeflate
                                                 : Encoding::kOther;
  }
  if (stream->served_path) {
    if (equals(key, "authorization") && !stream->credentials) {
      nghttp2_rcbuf_incref(value);
      stream->credentials = value;
    } else if (connection_of(user).endpoint.limits.traced) {
      if (equals(key, "traceparent")) join(*stream, &TraceHeaders::parent, text);
      else if (equals(key, "tracestate")) join(*stream, &TraceHeaders::state, text);
    }
  } else {
    nghttp2_rcbuf_incref(name);
    nghttp2_rcbuf_incref(value);
    stream->headers.emplace_back(name, value);
  }
  return 0;
}

void end_of_request(Stream &stream) {
  Endpoint &endpoint = stream.connection->endpoint;
  if (stream.kind == Stream::Kind::kServed && !stream.complete) {
    endpoint.refuse(stream, Why::kInvalid, kInvalidArgument, endpoint.method + " needs exactly one request message");
  } else if (stream.kind == Stream::Kind::kRelayed && !stream.forth_ended) {
    stream.forth_ended = true;
    if (stream.upstream_id >= 0 && stream.connection->upstream) {
      nghttp2_session_resume_data(stream.connection->upstream->session, stream.upstream_id);
      stream.connection->upstream->mark();
    }
  }
}

int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  connection_of(user).begun = true;
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  Stream *stream = stream_of(session, frame->hd.stream_id);
  if (!stream) return 0;
  const bool end = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
  if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) {
    stream->forth_ended = end && !stream->served_path;
    connection_of(user).endpoint.begin(*stream);
  }
  if (end) end_of_request(*stream);
  return 0;
}

// Takes the next bytes of a message; once it is whole it has arrived.
void receive(Stream &stream, const uint8_t *data, size_t size) {
  Endpoint &endpoint = stream.connection->endpoint;
  Call &call = *stream.call;
  if (stream.prefix_size < 5) {
    while (size && stream.prefix_size < 5) stream.prefix[stream.prefix_size++] = *data++, size--;
    if (stream.prefix_size < 5) return;
    const unsigned char *p = stream.prefix;
    const size_t length = size_t(p[1]) << 24 | size_t(p[2]) << 16 | size_t(p[3]) << 8 | p[4];
    if (p[0] > 1 || (p[0] == 1 && stream.encoding == Encoding::kIdentity)) {
      endpoint.refuse(stream, Why::kInvalid, kInternal,
                      endpoint.method + ": a message with compression flag " + std::to_string(p[0]) +
                          " without a grpc-encoding header that explains it");
      return;
    }
    if (length > endpoint.limits.max_message) {
      endpoint.refuse(stream, Why::kInvalid, kResourceExhausted,
                      "Received message larger than max (" + std::to_string(length) + " vs. " +
                          std::to_string(endpoint.limits.max_message) + ")");
      return;
    }
    if (endpoint.bytes.load(std::memory_order_relaxed) + length <= endpoint.limits.max_bytes) {
      try {
        call.message = Buffer(length);
      } catch (const std::bad_alloc &) {
        endpoint.refuse(stream, Why::kOutOfMemory, kResourceExhausted, "no memory for a message of " + std::to_string(length) + " bytes");
        return;
      }
    }
    if (p[0] == 1) call.encoding = stream.encoding;
  }
  const size_t length = call.message.size();
  const size_t take = std::min(size, length - stream.received);
  if (!call.message.data() || endpoint.bytes.load(std::memory_order_relaxed) + take > endpoint.limits.max_bytes) {
    endpoint.refuse(stream, Why::kQueueFull, kUnavailable,
                    "Exceeds maximum queue size: requests in progress hold more than " +
                        std::to_string(endpoint.limits.max_bytes) + " bytes",
                    "1");
    return;
  }
  memcpy(call.message.data() + stream.received, data, take);
  stream.received += take;
  stream.counted += take;
  endpoint.bytes.fetch_add(take, std::memory_order_relaxed);
  if (stream.received == length) {
    stream.complete = true;
    endpoint.arrived(stream.call);
  }
}

int on_data(nghttp2_session *session, uint8_t, int32_t id, const uint8_t *data, size_t size, void *user) {
  Stream *stream = stream_of(session, id);
  if (stream && stream->kind == Stream::Kind::kRelayed && stream->upstream_id >= 0) {
    stream->forth.append(reinterpret_cast<const char *>(data), size);
    Upstream *upstream = connection_of(user).upstream;
    nghttp2_session_resume_data(upstream->session, stream->upstream_id);
    upstream->mark();
    return 0;  // the window is opened again when it has been passed on
  }
  if (stream && stream->kind == Stream::Kind::kServed) {
    // Like gRPC itself, what follows the one message is ignored.
    if (!stream->complete) receive(*stream, data, size);
    nghttp2_session_consume(session, id, size);
  } else {
    // Refused: the client is not invited to send more of it.
    nghttp2_session_consume_connection(session, size);
  }
  return 0;
}

void forget(Stream *stream) {
  Connection &connection = *stream->connection;
  connection.endpoint.ended(*stream);
  if (stream->kind == Stream::Kind::kRelayed) {
    if (!connection.dead) nghttp2_session_consume_connection(connection.session, stream->forth.size());
    if (connection.upstream && stream->upstream_id >= 0) {
      nghttp2_session *session = connection.upstream->session;
      nghttp2_session_set_stream_user_data(session, stream->upstream_id, nullptr);
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, stream->upstream_id, NGHTTP2_CANCEL);
      nghttp2_session_consume_connection(session, stream->back.size());
      connection.upstream->mark();
    }
  }
  for (auto &[name, value] : stream->headers) {
    nghttp2_rcbuf_decref(name);
    nghttp2_rcbuf_decref(value);
  }
  if (stream->credentials) nghttp2_rcbuf_decref(stream->credentials);
  if (stream->previous) stream->previous->next = stream->next;
  else connection.streams = stream->next;
  if (stream->next) stream->next->previous = stream->previous;
  if (!--connection.open_streams) connection.quiet_ns = now_ns();
  delete stream;
}

int on_close(nghttp2_session *session, int32_t id, uint32_t, void *) {
  if (Stream *stream = stream_of(session, id)) forget(stream);
  return 0;
}

// ----------------------------------------------------------------------------------------- a client's connection: writing

// After the end of an answer, a client that has not ended its side is told that nobody listens any more. Not before:
// from the moment a stream is to be reset, the session sends nothing else on it.
int on_sent(nghttp2_session *session, const nghttp2_frame *frame, void *) {
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  if ((frame->hd.flags & NGHTTP2_FLAG_END_STREAM) &&
      nghttp2_session_get_stream_remote_close(session, frame->hd.stream_id) == 0)
    nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
  return 0;
}

ssize_t read_answer(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags,
                    nghttp2_data_source *source, void *) {
  auto &stream = *static_cast<Stream *>(source->ptr);
  const Buffer &framed = stream.answer->framed;
  const size_t left = framed.size() - stream.sent;
  const size_t size = std::min(left, room);
  if (size <= kCopy) {
    memcpy(buffer, framed.data() + stream.sent, size);
    stream.sent += size;
  } else {
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
  }
  if (size == left) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    nghttp2_submit_trailer(session, id, &kStatusOk, 1);
  }
  return ssize_t(size);
}

int send_answer(nghttp2_session *, nghttp2_frame *, const uint8_t *header, size_t size, nghttp2_data_source *source,
                void *user) {
  auto &stream = *static_cast<Stream *>(source->ptr);
  Output &out = connection_of(user).out;
  out.append(header, 9);
  out.refer(stream.answer, stream.answer->framed.data() + stream.sent, size);
  stream.sent += size;
  return 0;
}

ssize_t frame_size(nghttp2_session *, uint8_t, int32_t, int32_t connection_window, int32_t stream_window,
                   uint32_t most, void *) {
  return std::min<ssize_t>({connection_window, stream_window, ssize_t(most), ssize_t(kFrame)});
}

// ------------------------------------------------------------------------------------------------------------ relaying

ssize_t read_forth(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags,
                   nghttp2_data_source *, void *user) {
  Upstream &upstream = upstream_of(user);
  Stream *stream = stream_of(session, id);
  if (!stream) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;  // the client is gone
  if (stream->forth.empty() && !stream->forth_ended) return NGHTTP2_ERR_DEFERRED;
  const size_t size = std::min(room, stream->forth.size());
  memcpy(buffer, stream->forth.data(), size);
  stream->forth.erase(0, size);
  nghttp2_session_consume(upstream.front->session, stream->id, size);
  upstream.front->mark();
  if (stream->forth.empty() && stream->forth_ended) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return ssize_t(size);
}

std::vector<nghttp2_nv> pairs(const std::vector<Header> &headers) {
  std::vector<nghttp2_nv> result;
  for (const Header &header : headers)
    result.push_back({reinterpret_cast<uint8_t *>(const_cast<char *>(header.first.data())),
                      reinterpret_cast<uint8_t *>(const_cast<char *>(header.second.data())), header.first.size(),
                      header.second.size(), NGHTTP2_NV_FLAG_NONE});
  return result;
}

ssize_t read_back(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t room, uint32_t *flags,
                  nghttp2_data_source *source, void *user) {
  auto &stream = *static_cast<Stream *>(source->ptr);
  if (stream.back.empty() && !stream.back_ended) return NGHTTP2_ERR_DEFERRED;
  const size_t size = std::min(room, stream.back.size());
  memcpy(buffer, stream.back.data(), size);
  stream.back.erase(0, size);
  if (Upstream *upstream = connection_of(user).upstream; upstream && size) {
    if (stream.upstream_id >= 0) nghttp2_session_consume(upstream->session, stream.upstream_id, size);
    else nghttp2_session_consume_connection(upstream->session, size);
    upstream->mark();
  }
  if (stream.back.empty() && stream.back_ended) {
    *flags |= NGHTTP2_DATA_FLAG_EOF;
    if (!stream.trailers.empty()) {
      *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
      const auto trailers = pairs(stream.trailers);
      nghttp2_submit_trailer(session, id, trailers.data(), trailers.size());
    }
  }
  return ssize_t(size);
}

int on_back_begin(nghttp2_session *session, const nghttp2_frame *frame, void *) {
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  if (Stream *stream = stream_of(session, frame->hd.stream_id)) stream->back_headers.clear();
  return 0;
}

int on_back_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_size,
                   const uint8_t *value, size_t value_size, uint8_t, void *) {
  if (frame->hd.type != NGHTTP2_HEADERS) return 0;
  if (Stream *stream = stream_of(session, frame->hd.stream_id))
    stream->back_headers.emplace_back(std::string(reinterpret_cast<const char *>(name), name_size),
                                      std::string(reinterpret_cast<const char *>(value), value_size));
  return 0;
}

int on_back_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user) {
  if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
  Stream *stream = stream_of(session, frame->hd.stream_id);
  if (!stream) return 0;
  Connection &front = *upstream_of(user).front;
  const bool end = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
  if (frame->hd.type == NGHTTP2_HEADERS && !stream->back_begun) {
    stream->back_begun = true;
    stream->back_ended = end;
    const auto headers = pairs(stream->back_headers);
    nghttp2_data_provider provider{};
    provider.source.ptr = stream;
    provider.read_callback = read_back;
    nghttp2_submit_response(front.session, stream->id, headers.data(), headers.size(), end ? nullptr : &provider);
  } else {
    if (frame->hd.type == NGHTTP2_HEADERS) stream->trailers = std::move(stream->back_headers);
    if (end) stream->back_ended = true;
    nghttp2_session_resume_data(front.session, stream->id);
  }
  front.mark();
  return 0;
}

int on_back_data(nghttp2_session *session, uint8_t, int32_t id, const uint8_t *data, size_t size, void *user) {
  Stream *stream = stream_of(session, id);
  if (!stream) {
    nghttp2_session_consume_connection(session, size);
    return 0;
  }
  stream->back.append(reinterpret_cast<const char *>(data), size);
  Connection &front = *upstream_of(user).front;
  nghttp2_session_resume_data(front.session, stream->id);
  front.mark();
  return 0;
}

// The upstream will send no more for this stream.
void lose(Stream &stream, uint32_t code) {
  Connection &front = *stream.connection;
  stream.upstream_id = -1;
  if (!stream.back_begun) {
    front.endpoint.refuse(stream, Why::kControlPlane, kUnavailable, "the control plane ended the call without an answer");
  } else if (!stream.back_ended) {
    nghttp2_submit_rst_stream(front.session, NGHTTP2_FLAG_NONE, stream.id, code ? code : uint32_t(NGHTTP2_INTERNAL_ERROR));
    front.mark();
  }
}

int on_back_close(nghttp2_session *session, int32_t id, uint32_t code, void *) {
  if (Stream *stream = stream_of(session, id)) lose(*stream, code);
  return 0;
}

// Callbacks and options are the same for all sessions of a kind, and live as long as the process.
nghttp2_option *make_options() {
  nghttp2_option *options;
  nghttp2_option_new(&options);
  nghttp2_option_set_no_auto_window_update(options, 1);
  return options;
}

nghttp2_session_callbacks *make_front_callbacks() {
  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
  nghttp2_session_callbacks_set_on_header_callback2(callbacks, on_header);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);
  nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_sent);
  nghttp2_session_callbacks_set_send_data_callback(callbacks, send_answer);
  nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, frame_size);
  return callbacks;
}

nghttp2_session_callbacks *make_back_callbacks() {
  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_back_begin);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_back_header);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_back_frame);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_back_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_back_close);
  return callbacks;
}

nghttp2_option *options() {
  static nghttp2_option *const made = make_options();
  return made;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------------ interface

Connection::Connection(Endpoint &endpoint, int fd) : Channel(endpoint, fd) {
  static nghttp2_session_callbacks *const callbacks = make_front_callbacks();
  if (nghttp2_session_server_new2(&session, callbacks, static_cast<Channel *>(this), options())) throw std::bad_alloc();
  nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, uint32_t(kStreamWindow)},
                                       {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, kFrame},
                                       {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, endpoint.limits.max_streams}};
  nghttp2_submit_settings(session, NGHTTP2_FLAG_NONE, settings, 3);
  nghttp2_session_set_local_window_size(session, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Connection::~Connection() = default;

void Connection::closed() {
  while (streams) {
    // The session keeps pointers to the streams but is not used any more.
    forget(streams);
  }
  if (upstream) endpoint.destroy(*upstream);
  endpoint.connections.fetch_sub(1, std::memory_order_relaxed);
}

Upstream::Upstream(Endpoint &endpoint, int fd, Connection *front) : Channel(endpoint, fd), front(front) {
  static nghttp2_session_callbacks *const callbacks = make_back_callbacks();
  if (nghttp2_session_client_new2(&session, callbacks, static_cast<Channel *>(this), options())) throw std::bad_alloc();
  nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, uint32_t(kStreamWindow)},
                                       {NGHTTP2_SETTINGS_ENABLE_PUSH, 0}};
  nghttp2_submit_settings(session, NGHTTP2_FLAG_NONE, settings, 2);
  nghttp2_session_set_local_window_size(session, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Upstream::~Upstream() = default;

void Upstream::closed() {
  front->upstream = nullptr;
  if (front->dead) return;
  for (Stream *stream = front->streams; stream; stream = stream->next)
    if (stream->upstream_id >= 0) lose(*stream, NGHTTP2_INTERNAL_ERROR);
}

void submit_answer(Stream &stream) {
  nghttp2_session *session = stream.connection->session;
  const Answer &answer = *stream.answer;
  if (answer.status == kOk) {
    const nghttp2_nv headers[] = {kStatus200, kContentType, kAcceptEncoding};
    nghttp2_data_provider provider{};
    provider.source.ptr = &stream;
    provider.read_callback = read_answer;
    nghttp2_submit_response(session, stream.id, headers, 3, &provider);
    return;
  }
  const std::string status = std::to_string(answer.status), details = percent_encode(answer.details);
  nghttp2_nv headers[6] = {kStatus200, kContentType, kAcceptEncoding, field("grpc-status", status)};
  size_t count = 4;
  // Messages differ from call to call: they would only push what repeats out of the compression table.
  if (!details.empty()) headers[count++] = field("grpc-message", details, NGHTTP2_NV_FLAG_NO_INDEX);
  if (!answer.pushback.empty())
    headers[count++] = field("grpc-retry-pushback-ms", answer.pushback, NGHTTP2_NV_FLAG_NO_INDEX);
  nghttp2_submit_response(session, stream.id, headers, count, nullptr);
}

bool Connection::done() {
  // Closing with unread bytes in the socket would reset the connection, and the client might lose what it was sent: we
  // end our side and wait until it ends its own.
  if (half_closed) return true;
  if (tls) tls->farewell(fd);
  shutdown(fd, SHUT_WR);
  half_closed = true;
  quiet_ns = now_ns();
  return true;
}

void submit_http_error(Stream &stream, const char *status) {
  const std::string text(status);
  const nghttp2_nv headers[] = {field(":status", text)};
  nghttp2_submit_response(stream.connection->session, stream.id, headers, 1, nullptr);
  stream.connection->mark();
}

void submit_relayed(Stream &stream) {
  std::vector<nghttp2_nv> headers;
  for (auto &[name, value] : stream.headers) {
    const nghttp2_vec key = nghttp2_rcbuf_get_buf(name), text = nghttp2_rcbuf_get_buf(value);
    headers.push_back({key.base, text.base, key.len, text.len, NGHTTP2_NV_FLAG_NONE});
  }
  nghttp2_data_provider provider{};
  provider.source.ptr = &stream;
  provider.read_callback = read_forth;
  const int32_t id = nghttp2_submit_request(stream.connection->upstream->session, nullptr, headers.data(),
                                            headers.size(), stream.forth_ended ? nullptr : &provider, &stream);
  if (id < 0) {
    stream.connection->endpoint.refuse(stream, Why::kControlPlane, kUnavailable, "the control plane takes no more calls");
    return;
  }
  stream.upstream_id = id;
}

int connect_unix(const std::string &path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return -1;
  memcpy(address.sun_path, path.data(), path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd >= 0 && connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address) < 0) {
    ::close(fd);
    return -1;
  }
  return fd;
}

int64_t parse_timeout(const char *text, size_t size) {
  if (size < 2 || size > 9) return kNever;
  int64_t value = 0;
  for (size_t i = 0; i + 1 < size; i++) {
    if (text[i] < '0' || text[i] > '9') return kNever;
    value = value * 10 + (text[i] - '0');
  }
  switch (text[size - 1]) {
    case 'n': return value;
    case 'u': return value * 1000;
    case 'm': return value * 1000000;
    case 'S': return value * 1000000000;
    // At most 99,999,999 hours or minutes: beyond what 63 bits of nanoseconds hold, and beyond caring.
    case 'M': return value > 1000000 ? kNever : value * 60000000000;
    case 'H': return value > 10000 ? kNever : value * 3600000000000;
    default: return kNever;
  }
}

std::string percent_encode(const std::string &text) {
  static const char kHex[] = "0123456789ABCDEF";
  std::string result;
  result.reserve(text.size());
  for (const unsigned char c : text) {
    if (c >= ' ' && c <= '~' && c != '%') {
      result.push_back(char(c));
    } else {
      result.push_back('%');
      result.push_back(kHex[c >> 4]);
      result.push_back(kHex[c & 15]);
    }
  }
  return result;
}

}  // namespace onclock
