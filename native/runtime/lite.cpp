#include "runtime/lite.hpp"

#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace rookery {

#if defined(__unix__) || defined(__APPLE__)

ModelFile::ModelFile(const std::string& path, const void* mapped, std::size_t size)
    : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)), begin_(static_cast<const std::byte*>(mapped)), size_(size) {
  if (descriptor_ < 0) throw std::invalid_argument("the file '" + path + "' cannot be opened any more");
}

ModelFile::~ModelFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

void ModelFile::fetch(const std::byte* from, std::size_t count, std::byte* to) const {
  if (from >= begin_ && from + count <= begin_ + size_) {
    std::size_t done = 0;
    while (done < count) {
      const auto at = static_cast<off_t>(from - begin_) + static_cast<off_t>(done);
      const auto read = pread(descriptor_, to + done, count - done, at);
      if (read <= 0) break;  // the mapped bytes are there all the same
      done += static_cast<std::size_t>(read);
    }
    if (done == count) return;
  }
  std::memcpy(to, from, count);
}

#else

ModelFile::ModelFile(const std::string&, const void* mapped, std::size_t size)
    : begin_(static_cast<const std::byte*>(mapped)), size_(size) {}
ModelFile::~ModelFile() = default;
void ModelFile::fetch(const std::byte* from, std::size_t count, std::byte* to) const { std::memcpy(to, from, count); }

#endif

}  // namespace rookery
