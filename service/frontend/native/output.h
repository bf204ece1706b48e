// Bytes on their way to a socket: small pieces are copied together, large ones are only referred to.
//
// Promise: what was appended leaves in order, each byte once; nothing referred to is freed before it has left.
#pragma once

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace onclock {

class Output {
 public:
  size_t pending() const { return pending_; }

  void append(const void *data, size_t size) {
    if (segments_.empty() || segments_.back().owner) segments_.push_back({nullptr, nullptr, arena_.size(), 0});
    arena_.append(static_cast<const char *>(data), size);
    segments_.back().size += size;
    pending_ += size;
  }

  // `data` stays where it is for as long as `owner` lives.
  void refer(std::shared_ptr<void> owner, const char *data, size_t size) {
    segments_.push_back({std::move(owner), data, 0, size});
    pending_ += size;
  }

  // The next bytes, at most `most`: where they lie together, or copied to `room`.
  std::pair<const char *, size_t> next(char *room, size_t most) const {
    size_t size = 0;
    for (size_t i = first_; i < segments_.size() && size < most; i++) {
      const Segment &segment = segments_[i];
      const size_t skipped = i == first_ ? sent_ : 0;
      const char *data = (segment.owner ? segment.data : arena_.data() + segment.offset) + skipped;
      const size_t left = segment.size - skipped;
      if (!size && (left >= most || i + 1 == segments_.size())) return {data, std::min(left, most)};
      const size_t take = std::min(left, most - size);
      memcpy(room + size, data, take);
      size += take;
    }
    return {room, size};
  }

  // `taken` of the next bytes have left.
  void consume(size_t taken) {
    pending_ -= taken;
    while (taken > 0) {
      Segment &segment = segments_[first_];
      const size_t left = segment.size - sent_;
      if (taken < left) {
        sent_ += taken;
        return;
      }
      taken -= left;
      sent_ = 0;
      segment.owner.reset();
      first_++;
    }
    if (pending_ == 0) {
      segments_.clear();
      first_ = 0;
      arena_.clear();
      if (arena_.capacity() > kKeep) arena_.shrink_to_fit();
    }
  }

  // Sends what the socket takes. False: the connection is broken.
  bool write(int fd) {
    while (pending_ > 0) {
      iovec vectors[kVectors];
      size_t count = 0;
      for (size_t i = first_; i < segments_.size() && count < kVectors; i++) {
        const Segment &segment = segments_[i];
        const size_t skipped = i == first_ ? sent_ : 0;
        const char *data = segment.owner ? segment.data : arena_.data() + segment.offset;
        vectors[count++] = {const_cast<char *>(data) + skipped, segment.size - skipped};
      }
      msghdr message{};
      message.msg_iov = vectors;
      message.msg_iovlen = count;
      const ssize_t taken = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (taken < 0) {
        if (errno == EINTR) continue;
        return errno == EAGAIN || errno == EWOULDBLOCK;
      }
      consume(static_cast<size_t>(taken));
    }
    return true;
  }

 private:
  // sendmsg takes up to IOV_MAX = 1024 pieces; a few dozen are enough to amortise the call.
  static constexpr size_t kVectors = 64;
  // An arena that once held a burst is given back.
  static constexpr size_t kKeep = 1 << 20;

  struct Segment {
    std::shared_ptr<void> owner;  // null: the bytes are in the arena, at `offset`
    const char *data;
    size_t offset;
    size_t size;
  };

  std::string arena_;
  std::vector<Segment> segments_;
  size_t first_ = 0;  // the first segment not wholly sent, and how much of it was
  size_t sent_ = 0;
  size_t pending_ = 0;
};

}  // namespace onclock
