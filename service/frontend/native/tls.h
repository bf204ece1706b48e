// TLS on a client's connection, without a socket: bytes of the wire go in and come out, bytes of HTTP/2 likewise.
//
// Promise: whatever was fed is deciphered by the reads that follow, until `read` says that there is no more; what is
// enciphered leaves in order. Nothing blocks. A context is used by any number of connections and never changes: new
// certificates are a new context, which connections that are accepted from then on use.
#pragma once

#include <openssl/ssl.h>
#include <sys/types.h>

#include <memory>
#include <string>

#include "output.h"

namespace onclock {

using TlsContext = std::shared_ptr<SSL_CTX>;

// A server's context of PEM texts: the chain (the server's own certificate first), its key, and the authorities that
// clients' certificates must come from (empty: clients need none). Throws std::invalid_argument, which says what is wrong.
TlsContext make_tls_context(const std::string &chain, const std::string &key, const std::string &client_authorities);

// When the server's certificate ends, seconds since 1970.
int64_t end_of(const TlsContext &context);

class Tls {
 public:
  explicit Tls(const TlsContext &context);
  ~Tls();
  Tls(const Tls &) = delete;

  // Takes what came from the wire; it must stay where it is until `read` has said that there is no more.
  void feed(const char *data, size_t size);
  // Puts plain text into `to`. 0: there is no more; -1: the connection is over.
  ssize_t read(char *to, size_t room);
  // The handshake is done: there can be plain text.
  bool ready() const;
  // Enciphers what is pending and sends what the socket takes. False: the connection is broken.
  bool write(Output &plain, int fd);
  // Bytes that the socket has not taken.
  size_t pending() const { return cipher_.size() - sent_; }
  // Tells the peer that nothing follows, or what was wrong, if the socket takes it.
  void farewell(int fd);

 private:
  static const BIO_METHOD *method();
  static int take(BIO *bio, char *to, int room);
  static int give(BIO *bio, const char *data, int size);
  static long control(BIO *bio, int command, long number, void *pointer);
  bool send(int fd);

  TlsContext context_;
  SSL *ssl_;
  const char *in_ = nullptr;  // what was fed and not yet taken
  size_t in_size_ = 0;
  std::string cipher_;
  size_t sent_ = 0;
  bool broken_ = false;
};

}  // namespace onclock
