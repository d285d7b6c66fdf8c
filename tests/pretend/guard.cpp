// A CUDA device without CUDA: what torch asks a device's guard and hooks for, answered as by one idle card.
//
// With it the real autograd engine starts a thread for device 0 and runs backward passes there; tensors of the device
// are Python wrappers around host ones (card.py). Streams and events are told apart in Python, not here.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kCard(c10::DeviceType::CUDA, 0);

struct CardGuard final : public c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device exchangeDevice(c10::Device) const override { return kCard; }
    c10::Device getDevice() const override { return kCard; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const noexcept override { return default_stream(); }
    c10::Stream getDefaultStream(c10::Device) const override { return default_stream(); }
    c10::Stream getNewStream(c10::Device, int) const override { return default_stream(); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return default_stream(); }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}

private:
    static c10::Stream default_stream() { return c10::Stream(c10::Stream::DEFAULT, kCard); }
};
C10_REGISTER_GUARD_IMPL(CUDA, CardGuard)

struct CardHooks final : public at::CUDAHooksInterface {
    explicit CardHooks(at::CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    c10::DeviceIndex current_device() const override { return 0; }
    int getNumGPUs() const override { return 1; }
    // Noise is drawn on the host, so that a test knows what was drawn.
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
        return at::detail::getDefaultCPUGenerator();
    }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// torch looks its hooks up by this name.
const bool registered = [] {
    at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs arguments) {
        return std::unique_ptr<at::CUDAHooksInterface>(new CardHooks(arguments));
    });
    return true;
}();

}  // namespace
