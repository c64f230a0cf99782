// Kernels that begin before the kernels queued before them have ended, where `Kernel::launch_early` queued them; from Hopper on.

// Wait until the kernels queued before are done and what they wrote is seen: first of all in a kernel that is launched early.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let a kernel that is launched early take its places from now on.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
