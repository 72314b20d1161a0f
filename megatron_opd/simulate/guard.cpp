// A device "CUDA" for a PyTorch that was built without CUDA: eight devices with one stream each, on which nothing runs.
//
// Shape-only tensors on "cuda" make autograd's engine ask for the device's guard (streams, number of devices) and for the CUDA hooks (is
// there an accelerator, which device is current). Loaded with ctypes before torch is imported, since the engine asks once; the static
// initialisers register both.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr c10::DeviceIndex kDevices = 8;  // of a node: GPUS_PER_NODE in devices.py
thread_local c10::DeviceIndex current_device_index = 0;

c10::DeviceIndex exchange(c10::DeviceIndex index) {
  const auto before = current_device_index;
  current_device_index = index;
  return before;
}

struct ShapeOnlyGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;

  ShapeOnlyGuard() = default;
  explicit ShapeOnlyGuard(c10::DeviceType) {}

  c10::DeviceType type() const override { return static_type; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  c10::Device getDevice() const override { return {static_type, current_device_index}; }
  c10::Device exchangeDevice(c10::Device device) const override { return {static_type, exchange(device.index())}; }
  void setDevice(c10::Device device) const override { current_device_index = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device_index = device.index(); }

  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new ShapeOnlyGuard());

}  // namespace

namespace at {

// PyTorch looks for this very name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}

  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }

  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return current_device_index; }
  DeviceIndex getCurrentDevice() const override { return current_device_index; }
  void setCurrentDevice(DeviceIndex index) const override { current_device_index = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  void deviceSynchronize(DeviceIndex) const override {}

  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

// FakeTensorMode registers a guard of its own, whose current device is always the first: called after it was entered.
extern "C" void simulated_gpu_register() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(new ShapeOnlyGuard());
}

extern "C" void simulated_gpu_set_device(int index) { current_device_index = static_cast<c10::DeviceIndex>(index); }
