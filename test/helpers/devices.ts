import { type Device, deviceFacts, devices } from 'epmoe'

/** Where tests run: the CPU, and the first GPU when there is one. */
export const testDevices: Device[] = devices().slice(0, 2)
export const gpu: Device | undefined = testDevices[1]
/** The second GPU, for tests of several. */
export const secondGpu: Device | undefined = devices()[2]
/** Whether the GPUs are those of test/fixtures/stand_in, which torch knows nothing of. */
export const standIn: boolean = gpu !== undefined && deviceFacts(gpu).name.startsWith('stand-in')
