// One unary call between the connection that carries it and whoever answers it.
#pragma once

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

namespace onclock {

constexpr int64_t kNever = INT64_MAX;  // service.clock.NEVER_NS

// The clock of Python's time.monotonic_ns().
inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// gRPC status codes that the transport gives by itself.
enum Status {
  kOk = 0,
  kInvalidArgument = 3,
  kPermissionDenied = 7,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kUnauthenticated = 16
};

// How a message is compressed, by the `grpc-encoding` header.
enum class Encoding { kIdentity, kGzip, kDeflate, kOther };

// Memory that is not initialised, unlike a std::vector's.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) : data_(static_cast<char *>(malloc(size ? size : 1))), size_(size) {
    if (!data_) throw std::bad_alloc();
  }
  Buffer(Buffer &&other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Buffer &operator=(Buffer &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() { free(data_); }
  char *data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char *data_ = nullptr;
  size_t size_ = 0;
};

// What a call is answered with: a message (framed, status OK) or a status.
struct Answer {
  Buffer framed;  // the five bytes of gRPC's prefix, and the message
  int status = kOk;
  std::string details;   // UTF-8, not yet percent-encoded
  std::string pushback;  // grpc-retry-pushback-ms; empty: none
};

// What a client says of the trace that a call belongs to.
struct TraceHeaders {
  std::string parent, state;
};

class Connection;

// Shared by the stream that carries the call and by the Python object that answers it.
struct Call {
  // Under the endpoint's lock: where to answer; null once the stream is closed.
  Connection *connection = nullptr;
  int32_t stream = 0;
  // Whoever takes the call first decides how it ends: an answer, or the end of its stream.
  std::atomic<bool> taken{false};
  int64_t timeout_ns = kNever;  // what the client leaves us
  int64_t arrival_ns = 0;
  int64_t deadline_ns = kNever;
  Buffer message;
  Encoding encoding = Encoding::kIdentity;  // of this message
  size_t unpacked = 0;                      // bytes held besides `message`; under the endpoint's lock
  int64_t caller = 0;                       // who asks: see Access
  std::unique_ptr<TraceHeaders> trace;      // null: nothing is said, or nobody wants to know
  // The Python object, from the moment it was handed out until the call is taken: a reference that is owned here.
  void *owner = nullptr;
};

using CallPtr = std::shared_ptr<Call>;

}  // namespace onclock
