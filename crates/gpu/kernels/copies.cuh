// Copies from device to shared memory that are under way while a thread goes on, from compute capability 8.0 on.

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Begin to copy 16 bytes, zeros if !valid.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy16(half_t* to, const half_t* from, bool valid) {
  copy16(shared_address(to), (const void*)from, valid);
}

// What was begun since the last call is a group.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
