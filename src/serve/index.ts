export { type KernelMode, kernelModes, type ModelFacts, type ModelOptions } from './model.js'
export { type ServeOptions, type Server, serve } from './server.js'
